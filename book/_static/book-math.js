// Draw every formula of the page with the local KaTeX.
(function () {
  function draw() {
    const nodes = document.querySelectorAll("span.math:not(.drawn), div.math > .tex:not(.drawn)");
    for (const node of nodes) {
      const tex = node.textContent;
      node.classList.add("drawn");
      katex.render(tex, node, {
        displayMode: node.tagName === "DIV",
        macros: Object.assign({}, bookMacros),
        throwOnError: false,
        strict: "ignore",
      });
    }
    document.documentElement.dataset.math = String(nodes.length);
  }
  if (document.readyState === "loading") {
    document.addEventListener("DOMContentLoaded", draw);
  } else {
    draw();
  }
})();
