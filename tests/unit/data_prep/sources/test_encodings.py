"""The encoding that a text looks like."""

from __future__ import annotations

import pytest

from clipwright.data_prep.sources.encodings import likely_encoding

SAMPLES = {
    "cp949": "파란 원과 빨간 사각형이 있는 그림",
    "shift_jis": "青い円と赤い四角の絵があります",
    "euc_jp": "青い円と赤い四角の絵があります",
    "gb18030": "一只黑色的猫坐在红色的椅子上",
    "big5": "一隻黑色的貓坐在紅色的椅子上",
    "cp1251": "Чёрная кошка сидит на красном стуле",
    "koi8_r": "черная кошка сидит на красном стуле",
    "cp1253": "μια μαύρη γάτα κάθεται σε μια καρέκλα",
    "cp1255": "חתול שחור יושב על כיסא אדום",
    "cp1256": "قطة سوداء تجلس على كرسي أحمر",
    "tis_620": "แมวดำนั่งบนเก้าอี้สีแดง",
    "latin-1": "un café très près de la forêt, größe, niño, coração",
    "cp1252": "l’été à la plage – café",
    "utf-16": "a cat",
    "utf-16-le": "a cat",
    "utf-16-be": "a cat",
    "utf-8": "café 분류",
}


@pytest.mark.parametrize("encoding", SAMPLES)
def test_likely_encoding(encoding: str) -> None:
    table = f"image,caption\na.jpg,{SAMPLES[encoding]}\n".encode(encoding)
    assert likely_encoding(table) == encoding
    assert likely_encoding(table * 3000) == encoding  # the sample may end inside a character
