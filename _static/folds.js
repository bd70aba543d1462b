// The theme lets the keyboard scroll what is too wide, but looks for it only when the page loads or
// changes its size. What a reader unfolds must be looked at as well.
document.addEventListener("toggle", () => window.dispatchEvent(new Event("resize")), true);
