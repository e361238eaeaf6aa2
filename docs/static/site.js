// Frames with playable explorers: as high as their pages, in the colours of this one, with links to notebooks' pages.
// From disk each page is a stranger to the other, so they send messages, of which each takes only what it expects.
"use strict";
const frames = () => [...document.querySelectorAll("iframe.qlora-playable")];
const colour = (frame) => {
  const theme = document.documentElement.dataset.theme;               // the book theme sets light or dark
  if (theme) frame.contentWindow?.postMessage({ qloraTheme: theme }, "*");
};
window.addEventListener("message", ({ data, source }) => {
  const frame = frames().find((one) => one.contentWindow === source);
  if (!frame || !data) return;
  if (Number.isFinite(data.qloraHeight)) {
    frame.style.height = `${Math.min(Math.ceil(data.qloraHeight), 5000)}px`;
    colour(frame);                                                     // its page has begun to listen
  }
  const name = data.qloraNotebook;
  if (typeof name === "string" && /^\w+$/.test(name)) window.location.href = `${name}.html`;
});
new MutationObserver(() => frames().forEach(colour)).observe(document.documentElement, { attributeFilter: ["data-theme"] });
