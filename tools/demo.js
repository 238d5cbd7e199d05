// What the parts of the page of tools/demo.py tell the server. gradio gives `element`, the part, and
// `trigger`, which sends an event. What has data-pick tells its number when it is clicked. Over what
// has data-cell, patches, one can paint; then the numbers of those that are grey are sent. On the
// grid of patches, arrow keys move a mark, and the space bar or Enter does what a click does there.
let adds = null; // whether the stroke that is under way removes patches
let at = 0; // the patch that the arrow keys have reached

const send = () => {
  const gone = [...element.querySelectorAll(".mae-gone")];
  trigger("input", { removed: gone.map((cell) => Number(cell.dataset.cell)) });
};
const mark = () => {
  for (const [place, cell] of element.querySelectorAll(".mae-cells > *").entries())
    cell.toggleAttribute("data-at", place === at);
};

const stroke = (event) => {
  for (const point of [...(event.getCoalescedEvents?.() ?? []), event]) {
    const cell = document.elementFromPoint(point.clientX, point.clientY)?.closest("[data-cell]");
    if (cell && element.contains(cell)) cell.classList.toggle("mae-gone", adds);
  }
};
element.addEventListener("pointerdown", (event) => {
  const cell = event.target.closest("[data-cell]");
  if (!cell || event.button) return;
  event.preventDefault();
  cell.releasePointerCapture?.(event.pointerId); // a finger would keep to the first patch
  adds = !cell.classList.contains("mae-gone");
  stroke(event);
});
window.addEventListener("pointermove", (event) => adds !== null && stroke(event));
for (const end of ["pointerup", "pointercancel"])
  window.addEventListener(end, () => {
    if (adds === null) return;
    adds = null;
    send();
  });
element.addEventListener("click", (event) => {
  const chosen = event.target.closest("[data-pick]");
  if (!chosen) return;
  if (chosen.closest(".mae-cells")) at = Number(chosen.dataset.pick);
  trigger("select", { number: Number(chosen.dataset.pick) });
});
element.addEventListener("focusin", mark);
element.addEventListener("keydown", (event) => {
  const grid = event.target.closest(".mae-cells");
  if (!grid) return;
  const columns = Number(grid.style.getPropertyValue("--columns"));
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  const cell = grid.children[at];
  if (moves[event.key]) {
    if (grid.children[at + moves[event.key]]) at += moves[event.key];
    mark();
  } else if (event.key !== " " && event.key !== "Enter") return;
  else if (cell.dataset.pick) cell.click();
  else {
    cell.classList.toggle("mae-gone");
    send();
  }
  event.preventDefault();
});
// gradio takes the mark away where it brings the page to what the server answers.
new MutationObserver(mark).observe(element, { subtree: true, attributeFilter: ["data-at"] });
