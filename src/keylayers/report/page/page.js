// SPDX-License-Identifier: Apache-2.0
// Slider, table and choice of the ranking. Everything foreign is text: nothing is read as HTML.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const sections = [...document.querySelectorAll("section.ranking")];
  const whole = new Intl.NumberFormat("en");
  const share = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });
  const INK = "currentColor";  // so that dark mode and print need no new drawing
  const CONFIG = {
    background: "transparent", font: "system-ui, sans-serif", view: { stroke: null },
    text: { fill: INK },
    axis: { labelColor: INK, titleColor: INK, domainColor: INK, tickColor: INK, gridColor: INK, gridOpacity: 0.15 },
    legend: { labelColor: INK, titleColor: INK },
  };

  async function draw(place, spec) {
    const done = await vegaEmbed(place, spec, {
      actions: false, ast: true, config: CONFIG, defaultStyle: false, renderer: "svg",
      tooltip: { disableDefaultStyle: true },
    });
    return done.view;
  }

  class Ranking {
    constructor(section, content) {
      this.section = section;
      this.budgets = content.budgets;
      this.charts = content.charts;
      this.views = [];
      this.rows = [...section.querySelectorAll("table.modules tbody tr")];
      this.total = this.rows.reduce((sum, row) => sum + Number(row.dataset.parameters), 0);
      this.slider = section.querySelector("input[type=range]");
      this.number = section.querySelector("input.count");
      section.querySelector(".budget").hidden = false;
      section.querySelector(".filters").hidden = false;
      this.slider.addEventListener("input", () => this.choose(Number(this.slider.value)));
      this.number.addEventListener("change", () => this.choose(Number(this.number.value)));
      for (const name of [".filter", ".only"]) {
        section.querySelector(name).addEventListener("input", () => this.filter());
      }
      for (const head of section.querySelectorAll("table.modules th")) this.makeSortable(head);
      this.choose(content.count);
    }

    async drawOnce() {
      if (this.isDrawn) return;
      this.isDrawn = true;
      for (const place of this.section.querySelectorAll("[data-chart]")) {
        const view = await draw(place, this.charts[place.dataset.chart]);
        this.views.push(view);
        view.signal("budget", this.count).runAsync();
      }
    }

    choose(wanted) {
      const count = Math.min(Math.max(Math.round(wanted) || 1, 1), this.budgets.length);
      const bought = this.budgets[count - 1];
      this.count = count;
      this.slider.value = this.number.value = count;
      const isOpen = (row) => {
        const [least, most] = row.dataset.open.split(" ").map(Number);
        return least <= count && count <= most;
      };
      for (const row of this.rows) {
        const isTrained = Number(row.dataset.place) <= count;
        row.classList.toggle("is-trained", isTrained);
        row.firstElementChild.textContent = (isTrained ? "● yes" : "no") + (isOpen(row) ? " ~" : "");
      }
      const parts = [
        `${count} of ${this.rows.length} modules (${share.format(count / this.rows.length)})`,
        `${whole.format(bought.parameters)} parameters (${share.format(bought.parameters / this.total)})`,
        `a training step costs about ${bought.cost.toFixed(2)} of one that trains all`,
      ];
      if (bought.tied) parts.push(`${bought.tied} left out with the same score as the last one taken`);
      const numOpen = this.rows.filter(isOpen).length;
      if (numOpen) parts.push(`${numOpen} not decided by the data`);
      const text = parts.join("; ");
      this.section.querySelector(".bought").textContent = text;
      this.slider.setAttribute("aria-valuetext", `${count} modules`);
      for (const place of this.section.querySelectorAll(".chosen")) place.textContent = count;
      for (const view of this.views) view.signal("budget", count).runAsync();
      this.filter();
    }

    filter() {
      const wanted = this.section.querySelector(".filter").value.trim().toLowerCase();
      const isOnly = this.section.querySelector(".only").checked;
      let shown = 0;
      for (const row of this.rows) {
        const isShown = row.dataset.name.toLowerCase().includes(wanted)
          && (!isOnly || row.classList.contains("is-trained"));
        row.hidden = !isShown;
        shown += isShown;
      }
      this.section.querySelector(".shown").textContent = `${shown} of ${this.rows.length} shown`;
    }

    makeSortable(head) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => this.sort(head));
    }

    // Best, largest or first on the first click; again to turn it round. Empty values stay last.
    sort(head) {
      const key = head.dataset.key;
      const isText = key === "name" || key === "projection";
      const rises = ["place", "name", "projection", "block", "trained"].includes(key);
      const old = head.getAttribute("aria-sort");
      const isAscending = old ? old === "descending" : rises;
      const value = (row) => row.dataset[key === "trained" ? "place" : key];
      const order = isAscending ? 1 : -1;
      const compare = (one, other) => {
        const [first, second] = [value(one), value(other)];
        if (first === "" || second === "") return (first === "") - (second === "");
        const difference = isText
          ? first.localeCompare(second, "en", { numeric: true }) : Number(first) - Number(second);
        return order * difference || one.dataset.place - other.dataset.place;
      };
      for (const other of this.section.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", isAscending ? "ascending" : "descending");
      this.rows.sort(compare);
      this.section.querySelector("tbody").append(...this.rows);
    }
  }

{% if has_parts %}
{% include "parts.js" %}
  const rankings = sections.map((section, index) => {
    const content = data.rankings[index];
    return content.is_of_parts ? new Parts(section, content) : new Ranking(section, content);
  });
{% else %}
  const rankings = sections.map((section, index) => new Ranking(section, data.rankings[index]));
{% endif %}

  function show(index) {
    sections.forEach((section, other) => { section.hidden = other !== index; });
    return rankings[index].drawOnce();
  }

  for (const radio of document.querySelectorAll("input[name=ranking]")) {
    radio.addEventListener("change", () => show(Number(radio.value)));
  }
  const agreement = document.querySelector("[data-chart=agreement]");
  const chosen = document.querySelector("input[name=ranking]:checked");  // a reload keeps it
  show(chosen ? Number(chosen.value) : 0)
    .then(() => agreement && draw(agreement, data.agreement))
    .then(() => { document.documentElement.dataset.ready = "yes"; });
})();
