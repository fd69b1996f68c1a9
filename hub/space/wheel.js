() => {
  // A reading room is dark.
  document.body.classList.add("dark");
  document.documentElement.lang = "en";
  // The wheel over a plane moves its slider, which does the rest.
  document.addEventListener("wheel", (event) => {
    const plane = event.target.closest?.(".plane");
    if (!plane) return;
    const slider = document.querySelector(`#slice-${plane.dataset.plane} input[type=range]`);
    if (!slider || slider.disabled) return;
    event.preventDefault();
    const next = Number(slider.value) + (event.deltaY > 0 ? -1 : 1);
    slider.value = Math.min(Math.max(next, Number(slider.min)), Number(slider.max));
    slider.dispatchEvent(new Event("input", { bubbles: true }));
  }, { passive: false });
}
