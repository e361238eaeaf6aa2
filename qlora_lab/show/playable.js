// An explorer's page without a kernel: its own controls over pictures that were drawn beforehand. Plain JavaScript; the
// page (playable.py) puts RENDER, the controls' own modules by their class, before it. Nothing here fetches anything.
//
// A state is a list with the number of a stop for each control. It exists if at most `together` controls are away from
// their start; a control that moves beyond that sends the one that rested longest back to its start, and a line says so.

const [SAME, FIRST, NEXT, OLDER] = [0, 1, 2, 3];                       // frames.py says what they are

const bytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));

const inflated = (base64) =>
  new Response(new Blob([bytes(base64)]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();

// What the module of a control takes for its model: the state of a widget, and who listens to it.
const makeModel = (state, moved, onMove) => {
  const heard = {};
  return {
    get: (name) => state[name],
    set: (name, value) => { if (name === moved) state[name] = value; },
    save_changes: () => onMove(state[moved]),
    on: (events, listener) => { for (const event of events.split(" ")) (heard[event] ??= []).push(listener); },
    update: (values) => {
      Object.assign(state, values);
      const listeners = Object.keys(values).flatMap((name) => heard[`change:${name}`] ?? []);
      for (const listener of new Set(listeners)) listener();
    },
  };
};

// The numbers of each picture's tiles. One array for a picture: places x 4 bytes, some 10 MB for a page.
const unrolled = (steps, pictures, places) => {
  const all = [];
  let known = 0;
  for (let p = 0; p < pictures; p++) {
    const before = all[p - 1], now = new Uint32Array(places);
    for (let i = 0; i < places; i++) {
      const step = steps[p * places + i];
      if (step === SAME) now[i] = before[i];
      else if (step === FIRST) now[i] = all[0][i];
      else if (step === NEXT) now[i] = known++;
      else now[i] = known - (step - OLDER + 1);                        // so many tiles ago
    }
    all.push(now);
  }
  return all;
};

// A canvas that shows a picture, given the numbers of its tiles: only tiles that differ are copied.
const makeScreen = (canvas, { width, height, tile, across }, sheet) => {
  const pen = canvas.getContext("2d"), wide = Math.ceil(width / tile), shown = [];
  canvas.width = width; canvas.height = height;
  return (numbers) => numbers.forEach((number, place) => {
    if (shown[place] === number) return;
    shown[place] = number;
    pen.drawImage(sheet, (number % across) * tile, Math.floor(number / across) * tile, tile, tile,
                  (place % wide) * tile, Math.floor(place / wide) * tile, tile, tile);
  });
};

const play = async () => {
  const status = document.querySelector(".qlora-status");
  const [words, steps, sheet] = document.getElementById("film").textContent.split(" ");
  const page = JSON.parse(new TextDecoder().decode(await inflated(words)));
  const { controls, states, together, places } = page, count = states.length;
  const wide = page.bytes === 2 ? Uint16Array : Uint32Array;
  const pictures = unrolled(new wide(await inflated(steps)), count, places);
  const canvas = document.querySelector(".qlora-pane canvas"), sentence = document.querySelector(".said");
  const code = document.querySelector(".qlora-pane code"), details = document.querySelector(".qlora-pane details");
  const draw = makeScreen(canvas, page, await createImageBitmap(new Blob([bytes(sheet)], { type: "image/webp" })));
  const first = controls.map(({ state }) => ({ ...state }));           // a model changes its own
  const start = states[0], found = new Map(states.map((state, i) => [state.join(), i]));
  let now = start, rested = controls.map((_, c) => c), byKey = false;  // rested: the longest first

  const show = () => {
    const number = found.get(now.join());
    draw(pictures[number]);
    const [line, more] = page.sentences[number].split(page.in_detail);
    sentence.textContent = line;                                       // short: it is read aloud after each move
    details.hidden = !more;
    details.querySelector("div").textContent = more ?? "";
    canvas.setAttribute("aria-label", page.sentences[number]);         // some browsers have no property for it
    code.textContent = page.codes[number];
    models.forEach((model, c) => model.update({ ...first[c], ...page.fields[number][c],
                                                [controls[c].moved]: controls[c].stops[now[c]] }));
    player?.update({ last: isLast() });
  };

  // The stop for a value that a control has asked for, or -1. Of lists of levels there are few: a key goes to the next
  // one that way, a finger or a button to the nearest.
  const stopFor = (c, value) => {
    const stops = controls[c].stops, exact = stops.findIndex((stop) => String(stop) === String(value));
    if (exact >= 0 || !Array.isArray(value)) return exact;
    const old = stops[now[c]], moved = value.map((level, i) => i).filter((i) => value[i] !== old[i]), i = moved[0];
    const way = (stop) => Math.sign(stop[i] - old[i]) === Math.sign(value[i] - old[i]);
    const choice = stops.filter((stop) => !byKey || moved.length > 1 || way(stop));
    // the level that moved counts most: it follows the finger, and the others return to where they can
    const weight = moved.length === 1 ? 1000 : 1;
    const cost = (stop) => stop.reduce((sum, x, k) => sum + Math.abs(x - value[k]) * (k === i ? weight : 1), 0);
    return stops.indexOf(choice.sort((a, b) => cost(a) - cost(b))[0]);
  };

  const move = (c, value) => {
    const stop = stopFor(c, value), want = now.slice(), back = [];
    if (stop >= 0) want[c] = stop;                                     // else the control shows its true value again
    for (const other of rested) {
      if (found.has(want.join())) break;
      if (other === c || want[other] === start[other]) continue;
      want[other] = start[other];
      back.push(controls[other].state.description);
    }
    if (stop >= 0 && stop !== now[c]) rested = [...rested.filter((other) => other !== c), c];
    now = want;
    const many = together === 1 ? "One control" : `${together} controls`, names = back.join(" and ");
    status.textContent = names && `${many} at a time: ${names} went back to where this page began.`;
    show();
  };

  const models = controls.map(({ state, moved }, c) => makeModel(state, moved, (value) => move(c, value)));
  controls.forEach(({ kind, above }, c) => {
    const el = document.createElement("div");
    document.querySelector(above ? ".above" : ".beside").append(el);
    RENDER[kind].render({ model: models[c], el });
  });
  // The Play button of some explorers goes through the stops of one control: play.py does so where a kernel draws.
  const played = page.play?.control, isLast = () => now[played] === controls[played].stops.length - 1;
  const player = page.play && makeModel(page.play.state, "ticks", (ticks) => {
    move(played, controls[played].stops[isLast() ? 0 : now[played] + 1]);
    player.update({ shown: ticks });                                   // the next tick may come
  });
  const reset = makeModel({ description: "Reset", clicks: 0 }, "clicks", () => {
    now = start; status.textContent = ""; show();
  });
  const addButton = (kind, model) => {
    const el = document.createElement("div");
    document.querySelector(".beside").append(el);
    RENDER[kind].render({ model, el });
  };
  if (player) addButton("Play", player);
  addButton("Button", reset);
  document.addEventListener("keydown", () => { byKey = true; }, true);
  document.addEventListener("keydown", () => { byKey = false; });
  show();
};

// A control that needs no pictures of ours: all that it shows is in its state.
const playAlone = async () => {
  const words = await inflated(document.getElementById("film").textContent);
  const { kind, moved, state } = JSON.parse(new TextDecoder().decode(words));
  RENDER[kind].render({ model: makeModel(state, moved, () => {}), el: document.querySelector(".alone") });
};

// In a frame of another page: it is told how high this one is and which notebook a link names, and says which colours
// it has. Elsewhere there is no notebook that a link could open.
const frame = () => {
  const framed = window.parent !== window, tell = (message) => window.parent.postMessage(message, "*");
  const isLink = (el) => el.closest?.("a")?.getAttribute("href")?.match(/^(\w+)\.ipynb$/)?.[1];
  if (!framed) {
    const plain = () => document.querySelectorAll("a[href$='.ipynb']").forEach((a) => a.removeAttribute("href"));
    new MutationObserver(plain).observe(document.body, { childList: true, subtree: true });
    return;
  }
  new ResizeObserver(() => tell({ qloraHeight: document.documentElement.offsetHeight })).observe(document.body);
  document.addEventListener("click", (e) => {
    if (!isLink(e.target)) return;
    e.preventDefault(); tell({ qloraNotebook: isLink(e.target) });
  });
  window.addEventListener("message", ({ data }) => {
    if (["light", "dark"].includes(data?.qloraTheme)) document.documentElement.dataset.theme = data.qloraTheme;
  });
};

const begin = (player) => {
  frame();
  player().catch((error) => {
    document.querySelector(".qlora-status").textContent = `This page does not work in this browser: ${error.message}.`;
    throw error;
  });
};
