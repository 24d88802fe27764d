"""Self-contained web pages: the document with style and script, charts, and thumbnails."""
