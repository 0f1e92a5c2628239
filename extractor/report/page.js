// The search over samples. All text is in the page already, escaped; nothing is fetched and nothing is built from text.
(function () {
  const box = document.getElementById("search"), count = document.getElementById("found");
  const rows = Array.from(document.querySelectorAll("details.row"));
  const words = rows.map((row) => row.textContent.toLowerCase());

  // A number is a sample id or a row number; "file row 17" is that row and not 170; anything else is text.
  function matches(row, text, query) {
    if (/^#?\d+$/.test(query)) {
      const number = query.replace("#", "");
      return row.dataset.sample === number || (query[0] !== "#" && row.dataset.row === number);
    }
    if (/ row \d+$/.test(" " + query)) return (" " + row.dataset.source.toLowerCase()).endsWith(query);
    return text.includes(query);
  }

  function mark(row, query, ranges) {
    const walk = document.createTreeWalker(row.querySelector("pre"), NodeFilter.SHOW_TEXT);
    for (let node = walk.nextNode(); node; node = walk.nextNode()) {
      const text = node.data.toLowerCase();
      for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + query.length)) {
        const range = new Range();
        range.setStart(node, at);
        range.setEnd(node, at + query.length);
        ranges.push(range);
      }
    }
  }

  function search() {
    const query = box.value.trim().toLowerCase(), ranges = [];
    let found = 0;
    rows.forEach((row, i) => {
      row.hidden = query !== "" && !matches(row, words[i], query);
      if (row.hidden) return;
      found += 1;
      row.open = query === "" ? i === 0 : found <= 3;
      if (query !== "") mark(row, query, ranges);
    });
    if (window.Highlight && CSS.highlights) CSS.highlights.set("found", new Highlight(...ranges));
    count.value = query === "" ? rows.length + " samples" : found + " of " + rows.length + " samples";
  }

  box.addEventListener("input", search);
  search();
})();
