// A notebook that grows: cells come as HTML that the server has made safe.
"use strict";
const page = document.body.dataset.page;

for (const form of document.querySelectorAll("form[data-ask]"))
  form.addEventListener("submit", (event) => {
    if (!confirm(form.dataset.ask)) event.preventDefault();
  });

document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const step = { j: 1, k: -1 }[event.key];
  if (!step) return;
  const cells = [...document.querySelectorAll(".cell, .card a")];
  const at = cells.indexOf(document.activeElement);
  cells[Math.max(0, Math.min(cells.length - 1, at + step))]?.focus();
});

if (page === "notebook") {
  const cells = document.getElementById("cells");
  const status = document.getElementById("status");
  const events = new EventSource(document.body.dataset.events);
  const atEnd = () => innerHeight + scrollY > document.documentElement.scrollHeight - 80;
  const on = (name, act) =>
    events.addEventListener(name, (event) => {
      const follow = atEnd();
      act(JSON.parse(event.data));
      if (follow) scrollTo(0, document.documentElement.scrollHeight);
    });
  on("cell", ({ id, html }) => {
    const made = document.createRange().createContextualFragment(html).firstElementChild;
    const old = document.getElementById(id);
    const focused = old && old === document.activeElement;
    old ? old.replaceWith(made) : cells.append(made);
    if (focused) made.focus({ preventScroll: true });
    document.querySelector("main > .none")?.remove();
  });
  on("order", (order) => {
    const wanted = new Set(order);
    for (const cell of [...cells.children]) if (!wanted.has(cell.id)) cell.remove();
    order.forEach((id, place) => {
      const cell = document.getElementById(id);
      if (cell && cells.children[place] !== cell) cells.insertBefore(cell, cells.children[place] ?? null);
    });
  });
  on("state", ({ state, detail }) => {
    status.querySelector(".badge").textContent = state;
    status.querySelector(".badge").className = `badge ${state}`;
    status.querySelector(".detail").textContent = detail;
  });
  on("over", () => {
    events.close();
    location.reload();
  });
}

if (page === "overview")
  setInterval(async () => {
    if (document.hidden) return;
    const answer = await fetch("/cards");
    if (!answer.ok) return;
    const text = await answer.text();
    const list = document.getElementById("cards");
    if (list.dataset.last !== text && !list.contains(document.activeElement)) list.innerHTML = text;
    list.dataset.last = text;
  }, 3000);
