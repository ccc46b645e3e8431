"use strict";
// Keys press buttons. Without this script the page works with the mouse and the tab key.

// The address that `rlhf label` prints carries the token after #, which a browser does not send anywhere.
const token = document.getElementById("token");
if (token && location.hash.length > 1) {
  token.value = decodeURIComponent(location.hash.slice(1));
  history.replaceState(null, "", location.pathname);
}

let sent = false;
document.addEventListener("submit", (event) => {
  if (sent) event.preventDefault();
  sent = true;
});
window.addEventListener("pageshow", () => {
  sent = false;
});

document.addEventListener("keydown", (event) => {
  const note = document.getElementById("note");
  if (event.key === "Escape") {
    document.activeElement.blur();
    return;
  }
  // A key that is held down decides once, not page after page.
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.target.matches("input, textarea, select")) return;
  const key = event.key.toLowerCase();
  if (key === "n" && note) {
    event.preventDefault();
    note.focus();
    return;
  }
  const button = document.querySelector(`button[data-key="${CSS.escape(key)}"]:not(:disabled)`);
  if (button) {
    event.preventDefault();
    button.click();
  }
});
