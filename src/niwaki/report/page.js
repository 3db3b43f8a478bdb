"use strict";

// A table as CSV (RFC 4180): cells that carry their exact value give that instead of the rounded text.
function csvOf(table) {
  const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const value = (cell) => cell.dataset.value ?? cell.textContent.trim();
  return Array.from(table.rows, (row) => Array.from(row.cells, (cell) => quoted(value(cell))).join(",") + "\r\n").join("");
}

for (const table of document.querySelectorAll("table")) {
  const link = document.createElement("a");
  link.className = "button csv";
  link.textContent = "CSV";
  link.title = "Save this table with all digits";
  link.download = `${table.id}.csv`;
  link.href = "data:text/csv;charset=utf-8," + encodeURIComponent(csvOf(table));
  table.caption.querySelector("b").after(" ", link);
}

const root = document.documentElement;
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const toggle = document.createElement("button");
const isDark = () => (root.style.colorScheme || (prefersDark.matches ? "dark" : "light")) === "dark";
const label = () => (toggle.textContent = isDark() ? "Light colours" : "Dark colours");
toggle.className = "button";
toggle.id = "colours";
toggle.addEventListener("click", () => {
  root.style.colorScheme = isDark() ? "light" : "dark";
  label();
});
prefersDark.addEventListener("change", label);
label();
document.querySelector("header").prepend(toggle);
