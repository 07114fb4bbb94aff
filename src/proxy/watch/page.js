"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const PAST_MAX = 300;
  const by = id => document.getElementById(id);
  const make = (name, text, kind) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (kind) element.className = kind;
    return element;
  };
  const draw = (name, attributes, text) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const say = (id, text) => { const element = by(id); if (element.textContent !== text) element.textContent = text; };
  const number = (value, digits = 0) => value === null || value === undefined ? "–" :
    value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const rate = value => value > 0 && value < 1 ? value.toLocaleString("en", { maximumSignificantDigits: 2 }) :
    number(value, value >= 100 || value === 0 ? 0 : value >= 10 ? 1 : 2);
  const clock = value => value ? `${(value.ahead_s * 1e3).toFixed(1)} ± ${(value.within_s * 1e3).toFixed(1)} ms` : "–";
  const percent = value => value === null || value === undefined ? "–" : Math.round(value * 100) + " %";
  const known = value => value !== null && value !== undefined;

  let last = null, past = [], paused = false, chosen = null, states = new Map(), heard = 0, hint = null;

  const stateOf = worker => worker.kept_out ? "kept out" : worker.state;

  function announce(picture) {
    const news = [];
    for (const worker of picture.workers) {
      const before = states.get(worker.number), now = stateOf(worker);
      if (before !== undefined && before !== now) news.push(`${worker.name} is ${now}`);
      states.set(worker.number, now);
    }
    if (hint !== null && hint !== picture.balance.words) news.push(picture.balance.words);
    hint = picture.balance.words;
    if (news.length) say("said", news.join(". "));
  }

  function totals(picture) {
    const now = picture.totals;
    say("about", `${picture.pdlink}, ${picture.connector}` + (picture.draining ? ", draining" : ""));
    say("inflight", number(now.inflight));
    say("requests", rate(now.requests_per_s));
    say("waiting", number(now.waiting));
    say("transfers", number(now.transfers_active));
    say("moved", rate(now.gb_per_s));
    say("held", number(now.held_blocks));
    say("weights", known(picture.weights.version) ? String(picture.weights.version) : "–");
    const failure = by("weights-failure");
    failure.hidden = !picture.weights.last_failure;
    failure.textContent = picture.weights.last_failure ? "The last update of the weights failed: " + picture.weights.last_failure : "";
    by("hint").dataset.kind = picture.balance.hint.kind;
    say("hint", picture.balance.words);
    for (const element of document.querySelectorAll(".loads .load")) {
      const load = picture.balance[element.dataset.pool];
      element.hidden = picture.plain && element.dataset.pool === "prefill";
      element.querySelector("meter").value = load.utilisation ?? 0;
      element.querySelector(".words").textContent =
        `${percent(load.utilisation)} used, ${number(load.running, 1)} running, ${number(load.waiting, 1)} waiting on ${load.workers}`;
    }
  }

  function card(worker) {
    const button = make("button", undefined, "worker");
    button.type = "button";
    button.dataset.number = worker.number;
    button.append(make("b"), make("span", "", "state"), make("span", "", "load"), make("span", "", "place"));
    button.addEventListener("click", () => choose(chosen === worker.number ? null : worker.number));
    const item = make("li");
    item.append(button);
    return item;
  }

  function workers(picture) {
    by("map").toggleAttribute("data-plain", picture.plain);
    for (const role of ["prefill", "decode"]) {
      const list = document.querySelector(`.pool[data-role="${role}"] ul`);
      for (const worker of picture.workers.filter(worker => worker.role === role)) {
        let button = list.querySelector(`[data-number="${worker.number}"]`);
        if (!button) { list.append(card(worker)); button = list.querySelector(`[data-number="${worker.number}"]`); }
        const state = stateOf(worker);
        button.dataset.state = state;
        button.setAttribute("aria-pressed", String(chosen === worker.number));
        const [name, shown, load, place] = button.children;
        name.textContent = worker.name;
        shown.textContent = state + (known(worker.back_in_s) ? `, back in ${Math.ceil(worker.back_in_s)} s` : "") +
          (worker.phase && worker.phase !== "serving" ? `, ${worker.phase}` : "");
        load.textContent = `${number(worker.inflight)} in flight` +
          (known(worker.waiting) ? `, ${number(worker.waiting)} waiting` : "") +
          (known(worker.kv_usage) ? `, KV ${percent(worker.kv_usage)}` : "") +
          (worker.transfers_active ? `, ${worker.transfers_active} transfers` : "");
        place.textContent = (worker.gpus.length ? `GPU ${worker.gpus.join(", ")}` : worker.url.replace("http:" + "//", "")) +
          (known(worker.weight_version) ? `, weights ${worker.weight_version}` : "");
      }
    }
    const worker = picture.workers.find(worker => worker.number === chosen);
    by("chosen").hidden = !worker;
    if (!worker) return;
    say("chosen-title", `${worker.name}: ${stateOf(worker)}`);
    const facts = [["Role", worker.role], ["Address", worker.url], ["GPUs", worker.gpus.join(", ") || "–"], ["Ranks", worker.tp],
      ["In flight", number(worker.inflight)], ["Running", number(worker.running)], ["Waiting", number(worker.waiting)],
      ["KV in use", percent(worker.kv_usage)], ["Blocks held", number(worker.held_blocks)], ["Transfers", number(worker.transfers_active)],
      ["Weights", known(worker.weight_version) ? `${worker.weight_version} ${worker.phase ?? ""}` : "–"],
      ["Clock", clock(worker.clock)], ["Served", number(worker.served)], ["Failed", number(worker.failed)], ["Quarantines", number(worker.quarantines)]];
    by("chosen").querySelector("dl").replaceChildren(...facts.map(([name, value]) => {
      const pair = make("div");
      pair.append(make("dt", name), make("dd", String(value)));
      return pair;
    }));
  }

  const name = of => last.workers[of] ? last.workers[of].name : "–";
  const concerns = link => chosen === null || link.prefill === chosen || link.decode === chosen;

  function wires(picture) {
    const map = by("map").getBoundingClientRect(), shown = [], labels = [];
    const place = number => by("map").querySelector(`[data-number="${number}"]`)?.getBoundingClientRect();
    const links = picture.links.filter(concerns);
    const most = Math.max(1e-3, ...links.map(link => link.gb_per_s));
    // Labels at different heights, or those of crossing wires would lie on each other.
    links.forEach((link, at) => {
      const from = place(link.prefill), to = place(link.decode);
      if (!from || !to) return;
      const [x1, y1, x2, y2] = [from.right - map.left, from.top + from.height / 2 - map.top, to.left - map.left, to.top + to.height / 2 - map.top];
      const bend = (x2 - x1) / 2;
      const wire = draw("path", { d: `M${x1},${y1} C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`, class: `p-${link.path}`,
        "stroke-width": (1.5 + 6 * link.gb_per_s / most * (link.gb_per_s > 0)).toFixed(1),
        opacity: link.gb_per_s > 0 ? 1 : .45 });
      if (!link.connected) wire.setAttribute("stroke-dasharray", "3 5");
      shown.push(wire);
      if (links.length > 8) return;
      const t = (at % 3 + 1) / 4, s = 1 - t, mix = (a, b, c, d) => s * s * s * a + 3 * s * s * t * b + 3 * s * t * t * c + t * t * t * d;
      labels.push(draw("text", { x: mix(x1, x1 + bend, x2 - bend, x2), y: mix(y1, y1, y2, y2) - 5 },
        link.path + (link.gb_per_s > 0 ? ` ${rate(link.gb_per_s)} GB/s` : "")));
    });
    by("wires").replaceChildren(...shown, ...labels);
    const paths = [...new Set(picture.links.map(link => link.path))];
    by("paths").replaceChildren(...paths.map(path => make("span", path + " ", `dot p-${path}`)));
  }

  const row = cells => {
    const row = make("tr");
    for (const [text, kind] of cells) row.append(make("td", String(text), kind));
    return row;
  };

  function tables(picture) {
    const links = picture.links.filter(concerns);
    by("links").tBodies[0].replaceChildren(...links.map(link => row([
      [name(link.prefill), "word"], [name(link.decode), "word"], [link.path, `word dot p-${link.path}`], [rate(link.gb_per_s)], [number(link.done)],
      [number(link.failed), link.failed ? "bad" : ""], [number(link.bytes / 1e9, 3)],
      [number(link.wait_ms, 2)], [number(link.copy_ms, 2)], [number(link.validate_ms, 2)]])));
    by("no-links").textContent = links.length ? "" :
      picture.plain ? "Plain workers have no links." : "No runtime of pdlink's has told of a link yet.";
    const failures = picture.failures.filter(failure => chosen === null || failure.worker === chosen);
    by("failures").tBodies[0].replaceChildren(...failures.map(failure => row([
      [new Date(failure.at_unix_ms).toLocaleTimeString("en", { hour12: false }), "word"], [failure.times, "word"], [failure.what, "word"],
      [failure.worker === null ? "–" : name(failure.worker), "word"], [failure.cause, "text"]])));
    by("no-failures").hidden = failures.length > 0;
  }

  const nice = top => { const step = 10 ** Math.floor(Math.log10(top)); return [1, 2, 5, 10].map(m => m * step).find(value => value >= top); };

  function plot(id, words, ...series) {
    const [left, right, top, bottom] = [60, 472, 12, 126];
    const most = Math.max(0, ...series.flat()), scale = most > 0 ? nice(most) : 1;
    const x = at => right - (series[0].length - 1 - at) * (right - left) / (PAST_MAX - 1), y = value => bottom - value / scale * (bottom - top);
    const parts = [];
    for (const value of [0, scale / 2, scale]) {
      parts.push(draw("line", { x1: left, x2: right, y1: y(value), y2: y(value) }));
      parts.push(draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, String(+value.toPrecision(3))));
    }
    parts.push(draw("text", { x: right, y: 146, "text-anchor": "end" }, "now"));
    series.forEach((values, at) => parts.push(draw("polyline", { class: at ? "second" : "", points: values.map((value, at) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`).join(" ") })));
    const svg = by(id), latest = series[0].at(-1) ?? 0;
    svg.setAttribute("aria-label", `${words}: ${rate(latest)} now, ${rate(most)} at most in the last ${span()}`);
    svg.replaceChildren(...parts);
  }

  // Of the plots, in words.
  function span() {
    const seconds = Math.round(last.every_s * PAST_MAX);
    return seconds < 120 ? `${seconds} seconds` : `${Math.round(seconds / 60)} minutes`;
  }

  function plots() {
    say("rates-title", `The last ${span()}`);
    plot("plot-moved", "KV moved in GB/s", past.map(moment => moment.gb_per_s));
    plot("plot-requests", "Requests in flight", past.map(moment => moment.inflight), past.map(moment => moment.waiting));
  }

  function show() {
    if (!last) return;
    totals(last); workers(last); wires(last); tables(last); plots();
  }

  function choose(worker) {
    chosen = worker;
    show();
    if (worker !== null) say("said", `Only ${name(worker)} is shown`);
  }

  function live() {
    const age = (Date.now() - heard) / 1000, late = last ? age > 3 * last.every_s + 2 : false;
    const element = by("live"), state = paused ? "paused" : source.readyState === EventSource.OPEN && heard && !late ? "live" : heard ? "lost" : "waiting";
    element.dataset.state = state;
    element.textContent = { paused: "paused", live: "live", lost: `no news for ${Math.round(age)} s`, waiting: "connecting" }[state];
  }

  const source = new EventSource("admin/live");
  source.addEventListener("past", event => { past = JSON.parse(event.data).slice(0, -1); });
  source.addEventListener("picture", event => {
    heard = Date.now();
    const picture = JSON.parse(event.data);
    const { at_unix_ms, gb_per_s, requests_per_s, inflight, waiting } = picture.totals;
    past.push({ at_unix_ms, gb_per_s, requests_per_s, inflight, waiting });
    if (past.length > PAST_MAX) past.shift();
    announce(picture);
    if (!paused) { last = picture; show(); }
    live();
  });
  setInterval(live, 1000);
  by("all").addEventListener("click", () => { const was = chosen; choose(null); document.querySelector(`[data-number="${was}"]`)?.focus(); });
  by("pause").addEventListener("click", () => {
    paused = !paused;
    by("pause").setAttribute("aria-pressed", String(paused));
    by("pause").textContent = paused ? "Go on" : "Pause";
    live();
  });
  document.addEventListener("keydown", event => { if (event.key === "Escape" && chosen !== null) by("all").click(); });
  addEventListener("resize", () => last && wires(last));
})();
