"use strict";
// Without this script the page shows all figures, and all rows and images of a filtered list.
document.documentElement.classList.add("js");

// Values of a curve at the pointer. `data-curve` of an SVG: frame (left, top, width, height), x range, x, lines.
const values = document.createElement("div");
values.className = "values";
values.hidden = true;
document.body.append(values);

function hideValues() {
  values.hidden = true;
  document.querySelectorAll(".cursor").forEach((line) => line.remove());
}

function showValues(svg, index) {
  const curve = svg.curve;
  hideValues();
  const [left, top, width, height] = curve.frame, [low, high] = curve.range;
  const x = left + (width * (curve.x[index] - low)) / (high - low || 1);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  for (const [name, value] of Object.entries({ x1: x, x2: x, y1: top, y2: top + height, class: "cursor" }))
    line.setAttribute(name, value);
  line.style.stroke = "var(--soft)";
  svg.append(line);
  const number = (value) => (value === null ? "–" : value.toLocaleString("en", { maximumSignificantDigits: 5 }));
  const texts = [`${number(curve.x[index])} ${curve.unit}`];
  for (const [name, line] of Object.entries(curve.lines)) texts.push(`${name} ${number(line[index])}`);
  (svg.closest("dialog") || document.body).append(values);
  values.textContent = texts.join("\n");
  values.hidden = false;
  const at = new DOMPoint(x, top).matrixTransform(svg.getScreenCTM()), box = values.getBoundingClientRect();
  values.style.left = `${Math.max(4, Math.min(at.x + 10, innerWidth - box.width - 4))}px`;
  values.style.top = `${Math.max(4, at.y)}px`;
  svg.index = index;
}

function curveOf(target) {
  const svg = target.closest && target.closest("svg[data-curve]");
  if (svg && !svg.curve) svg.curve = JSON.parse(svg.dataset.curve);
  return svg && svg.curve.x.length ? svg : null;
}

document.addEventListener("pointermove", (event) => {
  const svg = curveOf(event.target);
  if (!svg) return hideValues();
  const { frame, range, x } = svg.curve;
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const wanted = range[0] + ((at.x - frame[0]) / frame[2]) * (range[1] - range[0]);
  let best = 0;
  x.forEach((value, i) => { if (Math.abs(value - wanted) < Math.abs(x[best] - wanted)) best = i; });
  showValues(svg, best);
});
document.addEventListener("keydown", (event) => {
  const svg = curveOf(event.target), step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!svg || !step) return;
  event.preventDefault();
  showValues(svg, Math.max(0, Math.min((svg.index ?? -1) + step, svg.curve.x.length - 1)));
});

// A figure or image enlarges on click or Enter; a second click or Escape closes it.
const dialog = document.createElement("dialog");
document.body.append(dialog);
dialog.addEventListener("click", () => dialog.close());
dialog.addEventListener("close", hideValues);

function enlarge(target) {
  const figure = target.closest && target.closest(".plot svg, figure img");
  if (!figure || figure.closest("dialog")) return;
  hideValues();
  const text = document.createElement("p");
  const caption = figure.closest("figure") && figure.closest("figure").querySelector("figcaption");
  text.textContent = caption ? caption.innerText : figure.getAttribute("aria-label") || figure.title || "";
  dialog.replaceChildren(figure.cloneNode(true), text);
  dialog.showModal();
}

document.querySelectorAll(".plot svg, figure img").forEach((figure) => { figure.tabIndex = 0; });
document.addEventListener("click", (event) => enlarge(event.target));
document.addEventListener("keydown", (event) => { if (event.key === "Enter") enlarge(event.target); });

// Filters and pages of a list: see the macro `filters`.
document.querySelectorAll("form.filters").forEach((form) => {
  const items = [...document.getElementById(form.dataset.target).querySelectorAll("[data-item]")];
  const perPage = Number(form.dataset.perPage), [previous, next] = form.querySelectorAll("button");
  const compare = {
    has: (value, wanted) => value.toLowerCase().includes(wanted.toLowerCase()),
    is: (value, wanted) => value === wanted,
    min: (value, wanted) => Number(value) >= Number(wanted),
    max: (value, wanted) => Number(value) <= Number(wanted),
  };
  let page = 0;
  function update() {
    const controls = [...form.querySelectorAll("[data-key]")].filter((control) => control.value !== "");
    const matching = items.filter((item) => controls.every((control) => {
      const value = control.dataset.key === "text" ? item.textContent : item.dataset[control.dataset.key] || "";
      return compare[control.dataset.compare](value, control.value);
    }));
    const pages = Math.max(1, Math.ceil(matching.length / perPage));
    page = Math.min(page, pages - 1);
    const shown = new Set(matching.slice(page * perPage, (page + 1) * perPage));
    items.forEach((item) => item.toggleAttribute("data-off", !shown.has(item)));
    previous.disabled = page === 0;
    next.disabled = page === pages - 1;
    previous.hidden = next.hidden = pages === 1;
    const count = `${matching.length.toLocaleString("en")} of ${items.length.toLocaleString("en")}`;
    form.querySelector("output").textContent = pages === 1 ? count : `page ${page + 1} of ${pages} (${count})`;
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => { page = 0; update(); });
  previous.addEventListener("click", () => { page -= 1; update(); });
  next.addEventListener("click", () => { page += 1; update(); });
  addEventListener("beforeprint", () => items.forEach((item) => item.removeAttribute("data-off")));
  addEventListener("afterprint", update);
  form.hidden = false;
  update();
});
