// The session: which pair is on, what was answered, what comes next.
//
// An answer counts once the server says that it is on disk; only then the next pair appears. Each
// answer has an identity, so that one sent twice, after a lost reply, is the same answer.

import { Viewer } from './viewer.js';

const $ = (id) => document.getElementById(id);
const POLL = 400; // milliseconds, while the server chooses a pair
const STEP = { turn: 0.12, move: 0.05, zoom: 1.15 }; // of one key press
const LONGEST = 86400; // seconds that the server takes for looking at a pair
const REMEMBERED = 'densityrl';

let viewer = null;
let session = null; // the server's state: {annotator, tasks, done, total, seconds, undo, waiting}
let pair = null; // {task, left, right}: what is in sight
let clock = { ran: 0, since: null }; // milliseconds that the pair was in sight, and since when
let unsaved = null; // {task, answer, reason, request}: sent, and no reply yet
const surfaces = new Map(); // task -> promise of {left, right}: {geometry} or {error}
const shading = { mode: 'surface', wireframe: false };

// --- talking to the server -----------------------------------------------------------------------

class Refused extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

async function ask(path, body) {
  const options = body && {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Refused(0, 'The server does not answer. Is `densityrl annotate` still running?');
  }
  const reply = await response.json().catch(() => ({ error: `The server answered ${response.status}.` }));
  if (!response.ok) throw new Refused(response.status, reply.error);
  return reply;
}

const identity = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, '0')).join('');

// --- what the page says --------------------------------------------------------------------------

function enter(state, text = '') {
  document.body.dataset.state = state;
  $('cover-text').textContent = text;
  const open = state === 'ready';
  for (const button of $('answers').querySelectorAll('button')) enable(button, open);
  enable($('undo'), session?.undo && ['ready', 'done', 'waiting', 'failed'].includes(state));
  enable($('pause'), ['ready', 'paused'].includes(state));
  $('pause').firstChild.textContent = state === 'paused' ? 'Go on ' : 'Pause ';
  if (open) { clock.since ??= performance.now(); } else { stopClock(); }
}

// Not `disabled`, which would take the focus from whoever goes from button to button by keyboard.
const enable = (button, on) => button.setAttribute('aria-disabled', !on);
const enabled = (button) => button.getAttribute('aria-disabled') !== 'true';

const state = () => document.body.dataset.state;

function say(text, bad = false) {
  $('message').textContent = text;
  $('message').classList.toggle('bad', bad);
}

function tell() {
  const { done, total, seconds } = session;
  $('progress').max = total;
  $('progress').value = done;
  const left = done < 5 ? '' : `, about ${minutes(seconds * (total - done))} left`;
  $('count').textContent = `${done} of ${total}${done < total ? left : ''}`;
}

const minutes = (seconds) => (seconds < 90 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`);

// --- time ----------------------------------------------------------------------------------------

function stopClock() {
  if (clock.since !== null) clock.ran += performance.now() - clock.since;
  clock.since = null;
}

const elapsed = () => clock.ran + (clock.since === null ? 0 : performance.now() - clock.since);

document.addEventListener('visibilitychange', () => {
  if (document.hidden) stopClock();
  else if (state() === 'ready') clock.since ??= performance.now();
});

// A reload in the middle of a pair forgets neither the name nor the time.
window.addEventListener('pagehide', () => {
  if (session) {
    const remembered = { annotator: session.annotator, task: pair?.task, ran: elapsed() };
    sessionStorage.setItem(REMEMBERED, JSON.stringify(remembered));
  }
});

// --- pairs ---------------------------------------------------------------------------------------

function fetchAhead() {
  for (const task of session.tasks) {
    if (surfaces.has(task)) continue;
    const one = (side) => viewer.load(`mesh/${task}/${side}`)
      .then((geometry) => ({ geometry }), (error) => ({ error: error.message }));
    surfaces.set(task, Promise.all([one('left'), one('right')]).then(([left, right]) => ({ left, right })));
  }
  for (const [task, loaded] of surfaces) {
    if (session.tasks.includes(task) || task === pair?.task) continue;
    surfaces.delete(task);
    loaded.then(({ left, right }) => { left.geometry?.dispose(); right.geometry?.dispose(); });
  }
}

async function next(reply, ran = 0) {
  session = reply;
  pair = null;
  if (state() === 'ready') enter('saving'); // no key answers what is not in sight yet
  clock = { ran, since: null };
  fetchAhead();
  tell();
  const [task] = session.tasks;
  if (task === undefined) {
    viewer.show(null, null);
    if (session.waiting) {
      enter('waiting', 'Choosing the next pair …');
      await new Promise((resolve) => setTimeout(resolve, POLL));
      if (state() === 'waiting') await refresh();
    } else {
      enter('done', 'That was the last pair. Thank you!\nEverything is saved; you may close the page.');
    }
    return;
  }
  // Only what takes longer than a blink gets a spinner.
  const spinner = setTimeout(() => enter('waiting', 'Making the shapes …'), 120);
  const both = await surfaces.get(task);
  clearTimeout(spinner);
  if (session.tasks[0] !== task) return; // another answer of the server came meanwhile
  pair = { task, ...both };
  $('gone-left').textContent = both.left.error ?? '';
  $('gone-right').textContent = both.right.error ?? '';
  $('gone-left').hidden = !both.left.error;
  $('gone-right').hidden = !both.right.error;
  viewer.show(both.left.geometry ?? null, both.right.geometry ?? null);
  document.body.dataset.task = task;
  enter('ready');
}

/** Ask where the session is; forgotten if an answer was given or began to be saved meanwhile. */
async function refresh() {
  const during = state();
  const [before, sent] = [session, unsaved];
  const stale = () => session !== before || unsaved !== sent || state() !== during;
  try {
    const reply = await ask(`api/state?annotator=${encodeURIComponent(session.annotator)}`);
    if (stale()) return;
    if (reply.tasks[0] !== pair?.task || pair === null) await next(reply);
    else { session = reply; tell(); fetchAhead(); enter(state()); }
  } catch (error) {
    if (stale()) return;
    say(error.message, true);
    enter(pair ? 'ready' : 'failed', error.message);
  }
}

async function choose(answer, reason = null) {
  if (state() !== 'ready') return;
  const { task } = pair;
  if (unsaved?.task !== task || unsaved.answer !== answer || unsaved.reason !== reason) {
    unsaved = { task, answer, reason, request: identity() };
  }
  const seconds = Math.min(elapsed() / 1000, LONGEST);
  enter('saving');
  try {
    const reply = await ask('api/choice', { annotator: session.annotator, seconds, ...unsaved });
    unsaved = null;
    say(`Saved: ${answer}.`);
    await next(reply);
  } catch (error) {
    if (error.status === 409) {
      unsaved = null;
      say(error.message);
      pair = null;
      await refresh();
    } else {
      say(`Not saved. ${error.message}`, true);
      enter('ready');
    }
  }
}

async function undo() {
  if (!enabled($('undo'))) return;
  const before = state();
  enter('saving');
  try {
    const reply = await ask('api/undo', { annotator: session.annotator, choice: session.undo });
    say('Taken back: answer this pair again.');
    await next(reply);
  } catch (error) {
    if (error.status === 409) { pair = null; await refresh(); say(error.message); }
    else { say(error.message, true); enter(before); }
  }
}

function pause() {
  if (state() === 'ready') enter('paused', 'Paused. Space goes on.');
  else if (state() === 'paused') enter('ready');
}

// --- views ---------------------------------------------------------------------------------------

function toggle(name) {
  const button = document.querySelector(`[data-toggle=${name}]`);
  const on = button.getAttribute('aria-pressed') !== 'true';
  const press = (which, pressed) =>
    document.querySelector(`[data-toggle=${which}]`).setAttribute('aria-pressed', pressed);
  press(name, on);
  if (name === 'turn') { viewer.autoTurn(on); return; }
  if (name === 'wireframe') {
    shading.wireframe = on;
  } else {
    for (const other of ['depth', 'normals', 'color']) if (other !== name) press(other, false);
    shading.mode = on ? name : 'surface';
  }
  viewer.shade(shading);
}

// --- keys and buttons ----------------------------------------------------------------------------

const KEYS = {
  ArrowLeft: () => choose('left'),
  ArrowRight: () => choose('right'),
  ArrowDown: () => choose('tie'),
  s: () => skip(),
  u: () => undo(),
  ' ': () => pause(),
  '?': () => $('keys').showModal(),
  f: () => viewer.look('front'),
  q: () => viewer.look('three-quarter'),
  p: () => viewer.look('side'),
  a: () => toggle('turn'),
  w: () => toggle('wireframe'),
  d: () => toggle('depth'),
  n: () => toggle('normals'),
  c: () => toggle('color'),
  i: () => viewer.move(0, STEP.move),
  k: () => viewer.move(0, -STEP.move),
  j: () => viewer.move(-STEP.move, 0),
  l: () => viewer.move(STEP.move, 0),
  '+': () => viewer.zoom(STEP.zoom),
  '=': () => viewer.zoom(STEP.zoom),
  '-': () => viewer.zoom(1 / STEP.zoom),
};
const TURNS = {
  ArrowLeft: [-STEP.turn, 0], ArrowRight: [STEP.turn, 0], ArrowUp: [0, STEP.turn], ArrowDown: [0, -STEP.turn],
};
const REPEATING = new Set('ijkl+=-'); // a key held down answers one pair, and moves the camera on

document.addEventListener('keydown', (event) => {
  if (!session || event.ctrlKey || event.altKey || event.metaKey || document.querySelector('dialog[open]')) return;
  if (event.shiftKey && TURNS[event.key]) {
    event.preventDefault();
    viewer.turn(...TURNS[event.key]);
    return;
  }
  if (event.key === ' ' && event.target.closest('button')) return; // presses the button
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  if (!event.repeat || REPEATING.has(event.key)) action();
});

for (const button of document.querySelectorAll('[data-answer]')) {
  const { answer } = button.dataset;
  button.addEventListener('click', () => (answer === 'skip' ? skip() : choose(answer)));
}
for (const button of document.querySelectorAll('[data-look]')) {
  button.addEventListener('click', () => viewer.look(button.dataset.look));
}
for (const button of document.querySelectorAll('[data-toggle]')) {
  button.addEventListener('click', () => toggle(button.dataset.toggle));
}
// After a click of the mouse, Space is to pause and not to press the same button again.
document.addEventListener('click', (event) => {
  if (event.detail > 0 && event.target.closest('main button, nav button')) $('canvas').focus();
});
$('undo').addEventListener('click', undo);
$('pause').addEventListener('click', pause);
$('help').addEventListener('click', () => $('keys').showModal());
window.addEventListener('focus', () => { if (session && !unsaved && state() === 'ready') refresh(); });

// --- skipping ------------------------------------------------------------------------------------

const reasons = [...document.querySelectorAll('[name=reason]')];

function skip() {
  if (state() !== 'ready') return;
  reasons[0].checked = true;
  $('other').value = '';
  $('skip').showModal();
  reasons[0].focus();
}

$('skip').addEventListener('keydown', (event) => {
  const number = Number(event.key) - 1;
  if (event.target !== $('other') && reasons[number]) {
    event.preventDefault();
    reasons[number].checked = true;
    (number === reasons.length - 1 ? $('other') : reasons[number]).focus();
  }
});
$('other').addEventListener('input', () => { reasons.at(-1).checked = true; });
$('skip-cancel').addEventListener('click', () => $('skip').close());
$('skip').querySelector('form').addEventListener('submit', (event) => {
  const { value } = reasons.find((reason) => reason.checked);
  const reason = value === 'other' ? $('other').value.trim() : value;
  if (!reason) {
    event.preventDefault();
    $('other').focus();
    return;
  }
  choose('skip', reason);
});

// --- beginning -----------------------------------------------------------------------------------

async function begin(annotator, remembered = null) {
  const reply = await ask('api/session', { annotator });
  enter('loading', 'Making the shapes …');
  say('');
  await next(reply, remembered?.task === reply.tasks[0] ? remembered.ran : 0);
}

function askName(about) {
  enter('start');
  $('name').value = about.name;
  $('names').replaceChildren(...about.annotators.map((name) => new Option(name)));
  $('start').showModal();
  $('start').addEventListener('cancel', (event) => event.preventDefault());
  $('start').querySelector('form').addEventListener('submit', async (event) => {
    event.preventDefault();
    try {
      await begin($('name').value);
      $('start').close();
      $('canvas').focus();
    } catch (error) {
      $('start-error').textContent = error.message;
    }
  });
}

try {
  const about = await ask('api/about');
  viewer = new Viewer($('canvas'), about);
  const remembered = JSON.parse(sessionStorage.getItem(REMEMBERED) ?? 'null');
  if (remembered) await begin(remembered.annotator, remembered);
  else askName(about);
} catch (error) {
  enter('failed', /WebGL/.test(error.message)
    ? 'This browser draws no 3D here: WebGL is switched off or missing.' : error.message);
}
