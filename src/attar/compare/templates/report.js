"use strict";
const root = document.documentElement;

// Theme: the reader's choice wins over the system's and is kept where the browser allows it.
const dark = matchMedia("(prefers-color-scheme: dark)");
const toggle = document.getElementById("theme");
const shown = () => root.dataset.theme || (dark.matches ? "dark" : "light");
const named = () => { toggle.textContent = shown() === "dark" ? "Light theme" : "Dark theme"; };
try {
  const kept = localStorage.getItem("attar-theme");
  if (kept === "dark" || kept === "light") root.dataset.theme = kept;
} catch { /* a file may have no storage */ }
toggle.hidden = false;
toggle.addEventListener("click", () => {
  root.dataset.theme = shown() === "dark" ? "light" : "dark";
  try { localStorage.setItem("attar-theme", root.dataset.theme); } catch { /* as above */ }
  named();
});
dark.addEventListener("change", named);
named();

// Sorting: an entry and the reasons for its missing runs are one table body and move together.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.querySelectorAll("thead tr:last-child th")];
  const bodies = [...table.tBodies];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const first = head.dataset.better === "high" ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      heads.forEach((each) => each.setAttribute("aria-sort", each === head ? order : "none"));
      const key = (body) => body.rows[0].cells[column].dataset.value;
      const sign = order === "ascending" ? 1 : -1;
      const numeric = head.dataset.sort !== "text";
      // What was not measured stays last in both orders.
      bodies.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (numeric ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true }));
      });
      table.append(...bodies);
    });
  });
}

// Copying
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    let done = false;
    try {
      await navigator.clipboard.writeText(source.textContent);
      done = true;
    } catch {
      getSelection().selectAllChildren(source);
      done = document.execCommand("copy");
    }
    button.textContent = done ? "Copied" : "Selected: press Ctrl+C";
  });
}

// Paper shows everything.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  closed.forEach((each) => { each.open = true; });
});
addEventListener("afterprint", () => closed.forEach((each) => { each.open = false; }));
