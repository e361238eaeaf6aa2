// One slide at a time. The address keeps its number, so that a reload stays where it was.
const slides = [...document.querySelectorAll("section")];
const here = () => Math.max(0, slides.findIndex((slide) => slide.id === location.hash.slice(1)));
const show = () => {
  slides.forEach((slide, i) => slide.classList.toggle("now", i === here()));
  document.title = slides[here()].querySelector("h1").textContent;
  scrollTo(0, 0);
};
const go = (i) => { location.hash = slides[Math.min(Math.max(i, 0), slides.length - 1)].id; };
const NEXT = ["ArrowRight", "PageDown", " "];
const BACK = ["ArrowLeft", "PageUp"];  // ArrowDown and ArrowUp scroll long notes
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (BACK.includes(event.key) || (event.key === " " && event.shiftKey)) go(here() - 1);
  else if (NEXT.includes(event.key)) go(here() + 1);
  else if (event.key === "Home") go(0);
  else if (event.key === "End") go(slides.length - 1);
  else if (event.key === "n" || event.key === "N") document.body.classList.toggle("notes");
  else return;
  event.preventDefault();
});
addEventListener("hashchange", show);
document.body.classList.add("shown");
show();
