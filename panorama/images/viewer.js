"use strict";

/* The image of the page, decoded from base64. A data: URL would be limited to 32 MB in Firefox. */
function readImage(element) {
  const text = atob(element.textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  element.remove();
  return new Blob([bytes], { type: element.type });
}

function showFlat(image) {
  document.getElementById("help").remove();
  const element = document.createElement("img");
  element.id = "flat";
  element.src = URL.createObjectURL(image);
  document.body.append(element);
}

/* The horizontal field of view that is 100 degrees along the longer side of the window. */
function firstField() {
  const narrow = Math.min(1, innerWidth / innerHeight);
  return (Math.atan(narrow * Math.tan((50 / 180) * Math.PI)) * 360) / Math.PI;
}

function lookAround(image, settings) {
  const container = document.getElementById("panorama");
  const panel = document.getElementById("panel");
  const panorama = URL.createObjectURL(image);
  const viewer = pannellum.viewer(container, { ...settings, panorama, hfov: firstField() });
  container.append(panel); // it stays in sight in full screen
  container.focus();

  // Pannellum would draw the first view before it limits its field.
  viewer.on("load", viewer.resize);
  // Without WebGL, or if the image is too large for it.
  const giveUp = () => {
    if (!container.isConnected) return;
    document.body.append(panel);
    container.remove();
    showFlat(image);
  };
  viewer.on("error", giveUp);
  container.addEventListener("webglcontextlost", giveUp, true);
  panel.addEventListener("keydown", (event) => event.stopPropagation()); // arrow keys scroll it
  document.addEventListener(
    "keydown",
    (event) => {
      const { altKey, ctrlKey, metaKey, key } = event;
      // Pannellum would take the browser's own shortcuts, and zoom at Control and Shift.
      if (altKey || ctrlKey || metaKey || key === "Shift") event.stopPropagation();
      else if (key.toLowerCase() === "f") viewer.toggleFullscreen();
      else if (key.toLowerCase() === "i") panel.open = !panel.open;
    },
    true,
  );
  return viewer;
}

const image = readImage(document.getElementById("image"));
const settings = JSON.parse(document.getElementById("settings").textContent);
const viewer = settings ? lookAround(image, settings) : showFlat(image);
