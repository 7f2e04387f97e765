// The page: everything it knows comes from the gateway's own API.

const $ = (id) => document.getElementById(id);
const PAGE_SIZE = 12;
const LOOK_EVERY = 2000;
const WATCHED = 100; // videos in one event stream

let key = sessionStorage.getItem("ltx2-key") || "";
let remixed = null;
let pool = null;
const cards = new Map(); // by id: {job, element, urls}
let watching = null; // the one event stream: browsers allow six connections, in all tabs together

class Problem extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "The gateway does not answer.");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  const again = answer.headers.get("retry-after");
  let message = body.error?.message || `The gateway answered ${answer.status}.`;
  if (again && answer.status === 429) message += ` (in about ${again} s)`;
  if (answer.status === 401) askForKey();
  throw new Problem(answer.status, message);
}

const json = async (path, options) => (await call(path, options)).json();

function askForKey() {
  if (!$("key-form").hidden) return;
  $("key-form").hidden = false;
  $("create").hidden = true;
  $("key").focus();
}

// Videos

function show(job, first = false) {
  let card = cards.get(job.id);
  if (!card) {
    const element = $("card").content.firstElementChild.cloneNode(true);
    card = { element, urls: [] };
    cards.set(job.id, card);
    element.querySelector(".prompt").textContent = job.prompt;
    element.querySelector(".prompt").title = job.prompt;
    element.querySelector(".remix").addEventListener("click", () => startRemix(card.job));
    element.querySelector(".delete").addEventListener("click", () => remove(card.job));
    if (first) $("videos").prepend(element);
    else $("videos").append(element);
  }
  const before = card.job;
  card.job = job;
  if (before && before.status === job.status && before.progress === job.progress) return;
  draw(card, before);
  if (!before && !ended(job)) watch();
  $("none").hidden = cards.size > 0;
}

const ended = (job) => job.status === "completed" || job.status === "failed";

function draw(card, before) {
  const { job, element } = card;
  const seconds = job.seconds ? `${job.seconds} s` : "";
  const took = job.completed_at ? `made in ${job.completed_at - job.created_at || "under 1"} s` : "";
  const shape = job.size.replace("x", " × ");
  element.querySelector(".meta").textContent = [shape, seconds, job.model, took].filter(Boolean).join(" · ");
  const screen = element.querySelector(".screen");
  const state = element.querySelector(".state");
  element.dataset.status = job.status;
  element.querySelector(".delete").textContent = ended(job) ? "Delete" : "Cancel";
  if (job.status === "completed") {
    state.replaceChildren();
    play(card, before !== undefined);
  } else if (job.status === "failed") {
    screen.replaceChildren(text("span", "No video"));
    state.replaceChildren(text("p", job.error.message, "failed"));
  } else {
    const box = document.createElement("div");
    box.className = "waits";
    const bar = document.createElement("progress");
    bar.max = 100;
    bar.setAttribute("aria-label", `Progress of ${job.prompt}`);
    if (job.status === "in_progress" && job.progress) bar.value = job.progress;
    const big = job.status === "queued" ? "Waits" : job.progress ? `${job.progress} %` : "Starts";
    box.append(text("span", big, "big"), bar, text("span", waitText(job), "when"));
    screen.replaceChildren(box);
  }
  if (before && before.status !== job.status && ended(job)) {
    say(job.status === "completed" ? `Finished: ${job.prompt}` : `Failed: ${job.prompt}. ${job.error.message}`);
  }
}

function waitText(job) {
  const queue = pool?.queue;
  if (!queue) return "";
  if (job.status === "queued") return `about ${Math.max(1, Math.ceil(queue.expected_wait_seconds))} s to wait`;
  return queue.typical_seconds ? `videos take some ${Math.max(1, Math.round(queue.typical_seconds))} s now` : "";
}

async function play(card, fresh) {
  const { job, element } = card;
  const path = `/v1/videos/${job.id}/content`;
  const video = document.createElement("video");
  video.controls = video.loop = video.playsInline = video.muted = true;
  video.preload = "none";
  video.setAttribute("aria-label", job.prompt);
  const screen = element.querySelector(".screen");
  screen.replaceChildren(video);
  try {
    video.poster = await source(card, `${path}?variant=thumbnail`);
    if (key && !fresh) {
      // A media element sends no key, so the whole video is fetched: when it is wanted.
      const wanted = text("button", "Play", "play");
      wanted.addEventListener("click", () => { wanted.remove(); load(card, video, path, true); });
      screen.append(wanted);
    } else {
      await load(card, video, path, fresh && !matchMedia("(prefers-reduced-motion: reduce)").matches);
    }
  } catch (error) {
    element.querySelector(".state").replaceChildren(text("p", error.message, "failed"));
  }
}

async function load(card, video, path, playing) {
  const download = card.element.querySelector(".download");
  download.download = `${card.job.id}.mp4`;
  video.src = download.href = await source(card, path);
  download.hidden = false;
  if (playing) await video.play().catch(() => {}); // a browser may forbid it; the controls are there
}

async function source(card, path) {
  if (!key) return path;
  const url = URL.createObjectURL(await (await call(path)).blob());
  card.urls.push(url);
  return url;
}

// All unfinished videos in one stream, which is begun again when there is one more. A tab that nobody looks at has none.
function watch() {
  watching?.abort();
  watching = null;
  const ids = [...cards.values()].filter((card) => !ended(card.job)).map((card) => card.job.id).slice(-WATCHED);
  if (!ids.length || document.visibilityState !== "visible") return;
  const mine = watching = new AbortController();
  follow(`/v1/videos/events?ids=${ids}`, mine.signal)
    .catch(() => {}) // the gateway went away
    .then(() => setTimeout(() => mine === watching && watch(), LOOK_EVERY));
}

async function follow(path, signal) {
  await Promise.resolve(); // the cards of a whole list begin one stream
  if (signal.aborted) return;
  const answer = await call(path, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      const kind = /^event: (\w+)/m.exec(event)?.[1];
      const data = /^data: (.*)$/m.exec(event)?.[1];
      if (kind === "video") show(JSON.parse(data));
      if (kind === "deleted") forget(JSON.parse(data).id);
    }
  }
}

async function remove(job) {
  try {
    await call(`/v1/videos/${job.id}`, { method: "DELETE" });
    say(ended(job) ? "Deleted" : "Cancelled");
  } catch (error) {
    if (error.status !== 404) return complain(error);
  }
  forget(job.id);
}

function forget(id) {
  const card = cards.get(id);
  if (!card) return;
  card.urls.forEach((url) => URL.revokeObjectURL(url));
  card.element.remove();
  cards.delete(id);
  $("none").hidden = cards.size > 0;
}

async function list(after = "") {
  const page = await json(`/v1/videos?limit=${PAGE_SIZE}${after ? `&after=${after}` : ""}`);
  page.data.forEach((job) => show(job));
  $("more").hidden = !page.has_more;
  $("more").dataset.after = page.last_id || "";
  $("none").hidden = cards.size > 0;
}

// The form

$("create").addEventListener("submit", async (event) => {
  event.preventDefault();
  complain(null);
  $("go").disabled = true;
  try {
    const form = new FormData();
    form.set("prompt", $("prompt").value);
    if (!remixed) choices(form);
    const path = remixed ? `/v1/videos/${remixed.id}/remix` : "/v1/videos";
    const job = await json(path, { method: "POST", body: form });
    show(job, true);
    say("Accepted");
    startRemix(null);
    look();
  } catch (error) {
    complain(error);
  }
  $("go").disabled = false;
});

function choices(form) {
  const chosen = pool?.shapes.find((shape) => shape.key === $("shape").value);
  if (chosen) {
    form.set("size", chosen.size);
    form.set("nvext[num_frames]", chosen.num_frames);
    if (chosen.model) form.set("model", chosen.model);
  }
  if ($("seed").value !== "") form.set("nvext[seed]", $("seed").value);
  if ($("picture").files.length) form.set("input_reference", $("picture").files[0]);
}

function startRemix(job) {
  remixed = job;
  $("remix-note").hidden = $("choices").disabled = Boolean(job);
  $("remix-note").hidden = !job;
  $("choices").hidden = Boolean(job);
  if (!job) return;
  $("remix-of").textContent = job.prompt;
  $("prompt").value = job.prompt;
  $("prompt").focus();
  $("prompt").select();
}

$("no-remix").addEventListener("click", () => startRemix(null));
$("more").addEventListener("click", () => list($("more").dataset.after).catch(complain));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem("ltx2-key", key);
  $("key-form").hidden = true;
  $("create").hidden = false;
  start();
});

function complain(error) {
  $("problem").textContent = error ? error.message : "";
}

function say(what) {
  $("spoken").textContent = what;
}

// The pool

const WORDS = { ready: "hot", generating: "hot, making", encoding: "hot, making", spawning: "starting", loading: "starting" };

async function look() {
  try {
    pool = await json("/v1/pool");
  } catch (error) {
    if (error.status !== 401) $("summary").textContent = error.message;
    return;
  }
  const { queue, shapes, workers, models } = pool;
  const waiting = queue.queued === 1 ? "1 job waits" : `${queue.queued} jobs wait`;
  $("summary").textContent = models.length ? `${models.join(", ")} · ${waiting}` : "No worker is there; jobs wait for one.";
  $("queue").textContent = `${waiting}, ${queue.in_progress} in work. ` +
    (workers.length ? `A new one waits about ${Math.ceil(queue.expected_wait_seconds)} s.` : "");
  fill($("shapes"), shapes, (shape) => {
    const item = document.createElement("li");
    item.className = shape.state;
    const state = (WORDS[shape.state] || shape.state) + (shape.waiting ? `, ${shape.waiting} waiting` : "");
    item.append(text("b", shape.key.replace("x", "×")), " ", text("span", state));
    return item;
  });
  fill($("workers"), workers.flatMap(devices), (element) => element);
  offer(shapes);
  for (const card of cards.values()) {
    const when = card.element.querySelector(".when");
    if (when) when.textContent = waitText(card.job);
  }
}

function devices(worker) {
  return Object.entries(worker.devices).map(([name, device]) => {
    const box = document.createElement("div");
    box.className = "device";
    const gib = (bytes) => `${(bytes / 2 ** 30).toFixed(1)} GiB`;
    const label = text("span", device.budget
      ? `${name}: ${gib(device.held)} of ${gib(device.budget)} in ${device.processes} processes, ${device.leases} generating`
      : `${name}: memory not known yet`);
    const meter = document.createElement("meter");
    meter.max = device.budget || 1;
    meter.value = device.budget ? device.held : 0;
    meter.setAttribute("aria-label", `Memory of ${name}`);
    box.append(label, meter);
    return box;
  });
}

function offer(shapes) {
  const select = $("shape");
  const keys = shapes.map((shape) => shape.key).join();
  if (!shapes.length || select.dataset.keys === keys) return;
  select.dataset.keys = keys;
  const chosen = select.value;
  fill(select, shapes, (shape) => {
    const option = document.createElement("option");
    option.value = shape.key;
    const length = shape.seconds ? `${shape.seconds} s` : `${shape.num_frames} frames`;
    option.textContent = `${shape.size.replace("x", " × ")}, ${length}` + (shape.model ? ` (${shape.model})` : "");
    return option;
  });
  if (shapes.some((shape) => shape.key === chosen)) select.value = chosen;
}

function fill(element, items, make) {
  element.replaceChildren(...items.map(make));
}

function text(tag, content, className = "") {
  const element = document.createElement(tag);
  element.textContent = content;
  element.className = className;
  return element;
}

async function start() {
  await look();
  await list().catch(complain);
}

document.addEventListener("visibilitychange", watch);
setInterval(() => document.visibilityState === "visible" && look(), LOOK_EVERY);
start();
