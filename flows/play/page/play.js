// The page of `cm play`. It holds no knowledge of models: the server says what one can do, and draws.

const HELP = {
  sample: "New images from noise alone. More network calls take longer, and mostly look better.",
  inpaint: "Paint over what the model is to invent; every other pixel stays.",
  colorize: "The luminance of the picture stays, the colours are invented.",
  superres: "Each patch of the picture is averaged to one pixel first; the model invents the details.",
  stroke: "Paint roughly; the model repaints it from a noise level that hides the roughness. Lower σ keeps more.",
  denoise: "Removes noise of standard deviation σ, in units of 127.5 grey levels.",
  interpolate: "Blends the noises of two seeds; both ends are the samples of these seeds.",
};
const LARGE = 320, SMALL = 72, BIG_SIDE = 96; // pixels of the screen
const RESULTS = ["output", "all", "way", "given"];
const FRAMES = 16, DENOISE_SIGMA = 0.2, PICTURE = "picture.png";
const $ = (id) => document.getElementById(id);
const form = $("form"), canvas = $("picture"), mask = $("mask");
const paper = canvas.getContext("2d", { alpha: false }), film = mask.getContext("2d");

let limit = Infinity; // bytes of a request
let spec = null; // what /model says
let picture = null; // {name, data, own}: the file that an edit reads; null before there is one
let painted = false; // whether the canvas differs from it
let made = null, asked = null, chosen = 0; // the last answer of /draw, its request, the result shown large
let busy = false, again = false;
let cursor = [0, 0], last = null;

const task = () => form.elements.task.value;
const url = (data) => `data:image/png;base64,${data}`;
const bytesOf = (element) => element.toDataURL("image/png").split(",")[1];

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  const gone = () => Promise.reject(new Error("cm play has ended; start it again and reload this page."));
  const answer = await fetch(path, body && { method: "POST", body: JSON.stringify(body), headers }).catch(gone);
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

async function attempt(action) {
  $("error").hidden = true;
  try {
    await action();
  } catch (error) {
    if (!spec) $("about").textContent = "";
    $("error").textContent = error.message;
    $("error").hidden = false;
  }
}

// Models

async function start() {
  const { models, max_bytes: bytes } = await ask("/models");
  limit = bytes;
  offer(models);
  const registered = ask("/registered").then((answer) => offer(answer.models));
  if (!$("model").length) await registered;
  if (!$("model").length) throw new Error("No models yet; cm run RECIPE trains one.");
  await Promise.all([chooseModel(), registered]);
}

function offer(models) {
  const known = [...$("model").options].map((option) => option.value);
  const fresh = Object.entries(models).filter(([name]) => !known.includes(name));
  $("model").append(...fresh.map(([name, text]) => new Option(text, name)));
  $("model").disabled = !$("model").length;
}

async function chooseModel() {
  $("about").textContent = "Loading the model…";
  [spec, form.inert] = [null, true];
  spec = await ask(`/model?name=${encodeURIComponent($("model").value)}`);
  const kind = spec.channels === 1 ? "grey" : "RGB", classes = spec.classes ? ` of ${spec.classes} classes` : "";
  const reasons = [...new Set(Object.values(spec.refused))].map((reason) => ` It ${reason}.`);
  $("about").textContent = `${spec.width}×${spec.height} ${kind} images${classes}.${reasons.join("")}`;
  for (const radio of form.elements.task) {
    radio.disabled = radio.value in spec.refused;
    radio.parentElement.title = spec.refused[radio.value] ?? "";
  }
  if (task() in spec.refused) form.elements.task.value = "sample";
  $("few").replaceChildren(...spec.steps.map((steps, index) => few(steps, index === 0)));
  $("factor").replaceChildren(...spec.factors.map((factor) => new Option(factor)));
  const labels = [...Array(spec.classes).keys()].map((label) => new Option(label));
  $("label").replaceChildren(new Option("all", ""), ...labels);
  Object.assign($("guidance"), spec.guidance ?? {}, { disabled: !spec.guidance });
  for (const one of [canvas, mask]) [one.width, one.height] = [spec.width, spec.height];
  $("brush").max = Math.max(2, Math.ceil(spec.width / 2));
  $("brush").value = Math.max(1, Math.round(spec.width / 10));
  $("inks").classList.toggle("off", spec.channels === 1);
  $("greys").classList.toggle("off", spec.channels !== 1);
  [made, asked] = [null, null];
  fit();
  const own = picture?.own ? picture : null;
  picture = null;
  form.inert = form.hidden = false;
  if (own) await read(own);
  await chooseTask();
}

function few(steps, checked) {
  const label = document.createElement("label"), text = document.createElement("span");
  const radio = Object.assign(document.createElement("input"), { type: "radio", name: "few", value: steps, checked });
  text.textContent = steps;
  label.append(radio, text);
  return label;
}

// Tasks

async function chooseTask() {
  const now = task(), edits = !["sample", "interpolate"].includes(now);
  for (const element of document.querySelectorAll("[data-for]")) {
    element.hidden = !element.dataset.for.split(" ").includes(now) || element.classList.contains("off");
  }
  $("help").textContent = HELP[now];
  if (edits) for (const id of RESULTS) $(id).hidden = true; // those of another task
  $("input").hidden = !edits;
  $("labels").hidden = !spec.classes;
  $("weights").hidden = !spec.guidance;
  $("label").options[0].disabled = now !== "sample"; // an edit needs one class
  if (now !== "sample" && $("label").value === "") $("label").value = spec.classes ? "0" : "";
  $("steps").value = spec.defaults.steps[now] ?? 1;
  $("sigma").value = spec.defaults.sigma[now] ?? DENOISE_SIGMA;
  $("n").value = now === "sample" ? 16 : 4;
  document.body.classList.toggle("painting", ["inpaint", "stroke"].includes(now));
  mask.hidden = now !== "inpaint";
  if (edits && !picture) await givePicture();
  if (!edits) await draw();
}

async function givePicture() {
  if (asked?.task !== "sample") {
    made = await ask("/draw", { ...base("sample"), steps: spec.steps[0], seed: Number($("seed").value), n: 1 });
    chosen = 0;
  }
  await use(made.images[chosen]);
}

function base(kind) {
  const label = $("label").value, weight = spec.guidance ? { guidance: Number($("guidance").value) } : {};
  return { model: $("model").value, task: kind, ...(label === "" ? {} : { label: Number(label) }), ...weight };
}

async function request() {
  const kind = task(), value = (id) => Number($(id).value), steps = Number(form.elements.few.value);
  if (kind === "interpolate") return { ...base(kind), seeds: [value("from"), value("to")], steps, n: FRAMES };
  const common = { ...base(kind), seed: value("seed"), n: kind === "denoise" ? 1 : value("n") };
  if (kind === "sample") return { ...common, steps };
  if (painted) {
    const drawn = { ...base("stroke"), picture: { name: PICTURE, data: bytesOf(canvas) } };
    picture = { name: PICTURE, data: (await ask("/picture", drawn)).image }; // in the model's channels
    painted = false;
  }
  const command = { ...common, steps: value("steps"), picture: { name: picture.name, data: picture.data } };
  if (kind === "inpaint") command.mask = { name: picture.name === "mask.png" ? "mask-1.png" : "mask.png", data: masked() };
  if (kind === "superres") command.factor = value("factor");
  if (kind === "stroke" || kind === "denoise") command.sigma = value("sigma");
  return command;
}

// Drawing

async function draw() {
  if (busy) {
    again = true; // with the controls as they will be then
    return;
  }
  busy = true;
  const begun = performance.now();
  const clock = setInterval(() => ($("go").textContent = `${((performance.now() - begun) / 1000).toFixed(0)} s…`), 1000);
  $("output").setAttribute("aria-busy", "true");
  try {
    do {
      again = false;
      const command = await request();
      made = await ask("/draw", command);
      asked = command;
      show();
    } while (again);
  } finally {
    busy = again = false;
    clearInterval(clock);
    $("go").textContent = "Draw";
    $("output").setAttribute("aria-busy", "false");
  }
}

function show() {
  const count = made.images.length, milliseconds = made.milliseconds.toPrecision(3);
  const seed = asked.seeds ? `seeds ${asked.seeds.join(" and ")}` : `seed ${asked.seed}`;
  $("time").textContent = `${Number(milliseconds)} ms for ${count} image${count > 1 ? "s" : ""}, ${seed}; ${made.how}`;
  $("told").textContent = made.notes.join("; ");
  for (const id of RESULTS) $(id).hidden = false;
  const given = made.shown.given ?? made.shown.grey;
  $("given").hidden = !given;
  if (given) $("given").querySelector("img").src = url(given);
  $("thumbs").replaceChildren(...made.images.map(thumb));
  $("all").hidden = count === 1;
  $("slider").max = count - 1;
  $("command").textContent = made.command;
  const files = [asked.picture, asked.mask].filter(Boolean).filter((file) => !(picture.own && file.name === picture.name));
  $("inputs").replaceChildren(...files.flatMap((file, index) => [index ? " and " : "It reads ", link(file)]));
  fit();
  choose(asked.seeds ? Math.min(Number($("slider").value), count - 1) : 0);
}

function thumb(data, index) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(Object.assign(new Image(), { src: url(data), alt: `Result ${index}` }));
  button.onclick = () => choose(index);
  return button;
}

function link(file) {
  const data = { href: url(file.data), download: file.name, textContent: file.name };
  return Object.assign(document.createElement("a"), data);
}

function choose(index) {
  chosen = index;
  $("large").src = url(made.images[index]);
  [...$("thumbs").children].forEach((button, place) => button.setAttribute("aria-pressed", place === index));
  $("slider").value = index;
  if (asked.seeds) {
    const share = (index / (made.images.length - 1)).toFixed(2);
    $("place").textContent = `${share} of the way from seed ${asked.seeds[0]} to seed ${asked.seeds[1]}`;
  }
  const file = `${String(index).padStart(6, "0")}.png`;
  $("save").href = url(made.images[index]);
  $("save").download = `${asked.task}-${file}`;
  $("where").textContent = `It writes this result to ${made.out}/${file}.`;
}

// Small images are enlarged by whole factors, so that their pixels stay sharp squares.
function fit() {
  if (!spec) return;
  const side = Math.max(spec.width, spec.height), room = Math.min(LARGE, document.querySelector("main").clientWidth - 50);
  const width = `${spec.width * Math.max(1, Math.floor(room / side))}px`;
  for (const one of [canvas, mask, $("large")]) one.style.width = width;
  for (const image of document.querySelectorAll("#thumbs img, #given img")) {
    const scale = side > BIG_SIDE ? BIG_SIDE / side : Math.max(1, Math.floor(SMALL / side));
    image.style.width = `${spec.width * scale}px`;
    image.style.imageRendering = side > BIG_SIDE ? "auto" : "pixelated";
  }
  placeCursor();
}

// The picture

async function use(data, file = { name: PICTURE, data }) {
  const image = Object.assign(new Image(), { src: url(data) });
  await image.decode();
  paper.drawImage(image, 0, 0);
  film.clearRect(0, 0, mask.width, mask.height);
  [picture, painted] = [file, false];
}

async function read(file) {
  const command = { ...base("stroke"), picture: { name: file.name, data: file.data } };
  const { image, notes } = await ask("/picture", command);
  await use(image, file);
  $("told").textContent = notes.join("; ");
}

async function open(file) {
  if (!file) return;
  if (file.size * 1.4 > limit) throw new Error(`${file.name}: larger than ${Math.floor(limit / 1.4 / 2 ** 20)} MiB`);
  const reader = new FileReader();
  await new Promise((done, failed) => Object.assign(reader, { onload: done, onerror: failed }).readAsDataURL(file));
  if (["sample", "interpolate"].includes(task())) {
    form.elements.task.value = ["inpaint", "stroke"].find((one) => !(one in spec.refused)) ?? task();
    await chooseTask();
  }
  await read({ name: file.name, data: reader.result.split(",")[1], own: true });
}

function masked() {
  const page = Object.assign(document.createElement("canvas"), { width: mask.width, height: mask.height });
  const context = page.getContext("2d", { alpha: false }), pixels = film.getImageData(0, 0, mask.width, mask.height);
  for (let at = 0; at < pixels.data.length; at += 4) pixels.data.fill(pixels.data[at + 3] ? 255 : 0, at, at + 3);
  for (let at = 3; at < pixels.data.length; at += 4) pixels.data[at] = 255;
  context.putImageData(pixels, 0, 0);
  return bytesOf(page);
}

function addNoise() {
  const pixels = paper.getImageData(0, 0, canvas.width, canvas.height), std = 127.5 * Number($("sigma").value);
  for (let at = 0; at < pixels.data.length; at += 4) {
    for (let channel = 0; channel < 3; channel++) {
      const normal = Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
      const grey = spec.channels === 1 && channel > 0;
      pixels.data[at + channel] = grey ? pixels.data[at] : Math.round(pixels.data[at + channel] + std * normal);
    }
  }
  paper.putImageData(pixels, 0, 0);
  painted = true;
}

// Brushes

const ink = () => (spec.channels === 1 ? `rgb(${Array(3).fill($("grey").value)})` : $("ink").value);

function dab(x, y) {
  const size = Number($("brush").value), radius = size / 2, before = Math.floor((size - 1) / 2);
  const masks = task() === "inpaint", context = masks ? film : paper;
  context.fillStyle = masks ? "#e4572e" : ink();
  for (let i = 0; i < size; i++) {
    for (let j = 0; j < size; j++) {
      if (size > 3 && Math.hypot(i - radius + 0.5, j - radius + 0.5) > radius) continue;
      if (masks && $("erase").checked) context.clearRect(x - before + i, y - before + j, 1, 1);
      else context.fillRect(x - before + i, y - before + j, 1, 1);
    }
  }
  if (!masks) painted = true;
}

function paint(event) {
  if (!document.body.classList.contains("painting")) return;
  const box = canvas.getBoundingClientRect();
  const x = Math.floor(((event.clientX - box.left) / box.width) * canvas.width);
  const y = Math.floor(((event.clientY - box.top) / box.height) * canvas.height);
  const [fromX, fromY] = last ?? [x, y], steps = Math.max(Math.abs(x - fromX), Math.abs(y - fromY), 1);
  for (let step = 1; step <= steps; step++) {
    dab(Math.round(fromX + ((x - fromX) * step) / steps), Math.round(fromY + ((y - fromY) * step) / steps));
  }
  last = [x, y];
}

function placeCursor() {
  const unit = parseFloat(canvas.style.width) / canvas.width;
  Object.assign($("cursor").style, { left: `${cursor[0] * unit}px`, top: `${cursor[1] * unit}px` });
  Object.assign($("cursor").style, { width: `${unit}px`, height: `${unit}px` });
}

function onKey(event) {
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] }[event.key];
  if (!move || !document.body.classList.contains("painting")) return;
  event.preventDefault();
  cursor = [cursor[0] + move[0], cursor[1] + move[1]].map((at, axis) => {
    return Math.min(Math.max(at, 0), (axis ? canvas.height : canvas.width) - 1);
  });
  if (event.key === " ") dab(...cursor);
  placeCursor();
}

// Events

form.onsubmit = (event) => {
  event.preventDefault();
  attempt(draw);
};
form.onchange = (event) => {
  if (event.target.name === "task") attempt(chooseTask);
  else if (["sample", "interpolate"].includes(task()) && form.checkValidity()) attempt(draw);
};
$("model").onchange = () => attempt(chooseModel);
$("dice").onclick = () => {
  const ids = task() === "interpolate" ? ["from", "to"] : ["seed"];
  for (const id of ids) $(id).value = Math.floor(Math.random() * 1e6);
  attempt(draw);
};
$("slider").oninput = () => choose(Number($("slider").value));
$("use").onclick = () =>
  attempt(async () => {
    await use(made.images[chosen]);
    if (["sample", "interpolate"].includes(task())) {
      form.elements.task.value = "inpaint" in spec.refused ? task() : "inpaint";
      await chooseTask();
    }
  });
$("clear").onclick = () => film.clearRect(0, 0, mask.width, mask.height);
$("fill").onclick = () => {
  paper.fillStyle = ink();
  paper.fillRect(0, 0, canvas.width, canvas.height);
  painted = true;
};
$("noise").onclick = addNoise;
$("copy").onclick = () =>
  attempt(async () => {
    await navigator.clipboard.writeText($("command").textContent);
    $("copy").textContent = "Copied";
    setTimeout(() => ($("copy").textContent = "Copy"), 1500);
  });
canvas.onpointerdown = (event) => {
  canvas.setPointerCapture(event.pointerId);
  last = null;
  paint(event);
};
canvas.onpointermove = (event) => event.buttons && paint(event);
canvas.onkeydown = onKey;
$("file").onchange = () => attempt(() => open($("file").files[0]).finally(() => ($("file").value = "")));
window.onresize = fit;
document.ondragover = (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
};
document.ondragleave = () => $("drop").classList.remove("over");
document.ondrop = (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  attempt(() => open(event.dataTransfer.files[0]));
};

attempt(start);
