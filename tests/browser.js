// What the browser test asks of a page, from inside it.
window.bookTest = {
  ready: async () => {
    await window.MathJax?.startup.promise;
    await document.fonts.ready;
  },

  openAll: () => {
    document.querySelectorAll("details").forEach((part) => { part.open = true; });
    document.querySelectorAll(".toggle-hidden > .admonition-title > .toggle-button")
      .forEach((button) => button.click());
    document.getElementById("pst-back-to-top").style = "display: block";  // else after a scroll
  },

  // Tag one element of each kind that can differ in contrast: axe takes minutes a page for all of
  // them, as each token of code is one. A link must also differ from the text around it.
  tagKinds: () => {
    document.querySelectorAll("[data-kind]").forEach((e) => e.removeAttribute("data-kind"));
    const kinds = new Set();
    for (const element of document.querySelectorAll("body *")) {
      const says = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
      if (!says || !element.checkVisibility({visibilityProperty: true})) continue;
      const own = getComputedStyle(element);
      const link = element.closest("a");
      const look = [own.color, own.fontSize, own.fontWeight];
      if (link) look.push("link", getComputedStyle(link).textDecorationLine,
                          getComputedStyle(link.parentElement).color);
      for (let under = element; under; under = under.parentElement) {
        const {opacity, backgroundColor, backgroundImage} = getComputedStyle(under);
        look.push(opacity, backgroundColor, backgroundImage);
        if (backgroundColor.startsWith("rgb(")) break;  // hides what is below it
      }
      const key = look.filter((x) => !["1", "rgba(0, 0, 0, 0)", "none"].includes(x)).join();
      if (kinds.has(key)) continue;
      kinds.add(key);
      element.setAttribute("data-kind", "");
      link?.setAttribute("data-kind", "");
    }
  },

  faults: async (colorsOnly) => {
    // Some time after a change the theme makes focusable what scrolls.
    const late = () => [...document.querySelectorAll("main [tabindex='-1']")]
      .some((part) => part.scrollWidth > part.clientWidth);
    for (let i = 0; i < 50 && late(); i += 1) await new Promise((go) => setTimeout(go, 100));
    // What fades in would be measured half transparent.
    document.getAnimations().filter((a) => a.effect.getComputedTiming().endTime < Infinity)
      .forEach((a) => a.finish());
    window.bookTest.tagKinds();
    axe.configure({rules: [{id: "color-contrast", selector: "[data-kind]"},
                           {id: "link-in-text-block", selector: "a[data-kind]"}]});
    // Without `preload` off, axe fetches the style sheets again, some from a wrong address.
    const options = {resultTypes: ["violations"], preload: false};
    // Colors are all that the scheme changes.
    if (colorsOnly) options.runOnly = ["color-contrast", "link-in-text-block"];
    const {violations} = await axe.run(document, options);
    return violations.flatMap((rule) => rule.nodes.map((node) => ({
      impact: node.impact,
      text: `${rule.id}: ${node.target.join(" ")}: ${node.failureSummary}`,
    })));
  },
};
