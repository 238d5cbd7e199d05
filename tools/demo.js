// What the parts of the page of tools/demo.py tell the server. gradio gives `element`, the part, and
// `trigger`, which sends an event. What has data-pick tells its number when it is clicked. Over what
// has data-cell, patches, one can paint; then the numbers of those that are grey are sent.
let adds = null; // whether the stroke that is under way removes patches

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
    const gone = [...element.querySelectorAll(".mae-gone")];
    trigger("input", { removed: gone.map((cell) => Number(cell.dataset.cell)) });
  });
element.addEventListener("click", (event) => {
  const chosen = event.target.closest("[data-pick]");
  if (chosen) trigger("select", { number: Number(chosen.dataset.pick) });
});
