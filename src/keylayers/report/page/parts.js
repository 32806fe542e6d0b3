  // A ranking of rank-one parts: the slider goes over parameters, in equal factors.
  class Parts extends Ranking {
    constructor(section, content) {
      super(section, content);
      // The number is a share in percent, not a position: it takes the next smaller one.
      this.number.addEventListener("change", (event) => {
        event.stopImmediatePropagation();
        this.chooseShare(Number(this.number.value) / 100);
      }, { capture: true });
    }

    shareOf(position) {
      return this.budgets[position].parameters / this.budgets.at(-1).parameters;
    }

    chooseShare(wanted) {
      this.choose(this.budgets.findLastIndex((_, place) => this.shareOf(place) <= wanted));
    }

    choose(wanted) {
      const position = Math.min(Math.max(Math.round(wanted) || 0, 0), this.budgets.length - 1);
      const bought = this.budgets[position];
      this.count = position;
      this.slider.value = position;
      this.number.value = Number((100 * this.shareOf(position)).toPrecision(3));
      let numModules = 0;
      this.rows.forEach((row) => {
        const rank = bought.ranks[Number(row.dataset.place) - 1];
        row.dataset.rank = rank;
        row.firstElementChild.textContent = rank;
        row.classList.toggle("is-trained", rank > 0);
        numModules += rank > 0;
      });
      const all = this.budgets.at(-1);
      const texts = [
        `${whole.format(bought.parts)} of ${whole.format(all.parts)} parts in ${numModules} of ${this.rows.length} modules`,
        `${whole.format(bought.parameters)} of ${whole.format(all.parameters)} parameters (${share.format(this.shareOf(position))})`,
      ];
      if (bought.carried) texts.push(bought.carried);
      this.section.querySelector(".bought").textContent = texts.join("; ");
      this.slider.setAttribute("aria-valuetext", share.format(this.shareOf(position)));
      for (const place of this.section.querySelectorAll(".chosen")) place.textContent = bought.budget;
      for (const view of this.views) view.signal("budget", position).runAsync();
      this.filter();
    }
  }

