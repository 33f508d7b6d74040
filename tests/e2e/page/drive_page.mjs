// Uses the page as somebody would, in a real browser, by the protocol of its developer tools:
//   node drive_page.mjs BROWSER PROFILE_FOLDER URL light|dark [SCREENSHOT.png]
// Sends two messages and stops the second; prints what the page then shows, and what the browser complained of.
import { spawn } from "node:child_process";
import { writeFileSync } from "node:fs";

const [browserPath, profile, url, scheme, screenshot] = process.argv.slice(2);
const FLAGS = [
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--disable-dev-shm-usage",
  "--hide-scrollbars",
  "--remote-debugging-port=0",
  `--user-data-dir=${profile}`,
  "about:blank",
];
const PATIENCE_MS = 30_000;

const browser = spawn(browserPath, FLAGS, { stdio: ["ignore", "ignore", "pipe"] });
const complaints = [];

// The address of the developer tools, which the browser writes at its start.
function endpoint() {
  return new Promise((resolve, reject) => {
    let said = "";
    browser.stderr.on("data", (data) => {
      said += data;
      const found = said.match(/DevTools listening on (ws:\S+)/);
      if (found) resolve(found[1]);
    });
    browser.on("exit", () => reject(new Error(`the browser ended: ${said}`)));
  });
}

// A function that sends a command and gives its result.
async function connect(address) {
  const socket = new WebSocket(address);
  const waiting = new Map(); // id -> what takes the answer
  await new Promise((resolve, reject) => {
    socket.onopen = resolve;
    socket.onerror = () => reject(new Error(`no connection to ${address}`));
  });
  socket.onmessage = ({ data }) => {
    const message = JSON.parse(data);
    if (message.id) waiting.get(message.id)(message);
    else if (message.method === "Runtime.exceptionThrown") complaints.push(message.params.exceptionDetails.text);
    else if (message.method === "Log.entryAdded") complaints.push(message.params.entry.text);
  };
  let last = 0;
  return (method, params = {}, sessionId = undefined) =>
    new Promise((resolve, reject) => {
      const id = ++last;
      waiting.set(id, ({ error, result }) => (error ? reject(new Error(error.message)) : resolve(result)));
      socket.send(JSON.stringify({ id, method, params, sessionId }));
    });
}

async function main() {
  const command = await connect(await endpoint());
  const { targetId } = await command("Target.createTarget", { url: "about:blank" });
  const { sessionId } = await command("Target.attachToTarget", { targetId, flatten: true });
  const page = (method, params) => command(method, params, sessionId);
  const run = async (expression) => {
    const { result } = await page("Runtime.evaluate", { expression, awaitPromise: true, returnByValue: true });
    return result.value;
  };
  const until = async (expression) => {
    const end = Date.now() + PATIENCE_MS;
    while (!(await run(expression))) {
      if (Date.now() > end) throw new Error(`never true: ${expression}; ${await run("document.body.innerText")}`);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  };
  const write = async (text) => {
    await run("document.getElementById('prompt').focus()");
    await page("Input.insertText", { text });
    await page("Input.dispatchKeyEvent", { type: "keyDown", key: "Enter", code: "Enter", windowsVirtualKeyCode: 13 });
  };

  await page("Runtime.enable");
  await page("Log.enable");
  await page("Page.enable");
  await page("Emulation.setDeviceMetricsOverride", { width: 880, height: 660, deviceScaleFactor: 1, mobile: false });
  await page("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value: scheme }] });
  await page("Page.navigate", { url });
  await until("document.getElementById('state')?.textContent === 'serving'");

  await run("document.getElementById('max-tokens').value = 40");
  await write("Why is the sky blue?");
  await until("document.body.dataset.busy === 'true'");
  await until("document.body.dataset.busy === 'false'");
  const first = await run("document.querySelector('.turn.assistant p').textContent");
  await run("document.getElementById('max-tokens').value = 400");
  await write("And at night?");
  await until("document.querySelectorAll('.turn.assistant')[1]?.querySelector('p').textContent.length > 20");
  await until("document.getElementById('running').textContent === '1'");
  await until("document.getElementById('speed').textContent > 0");
  if (screenshot) {
    const { data } = await page("Page.captureScreenshot", { format: "png" });
    writeFileSync(screenshot, Buffer.from(data, "base64"));
  }
  await run("document.getElementById('stop').click()");
  await until("document.body.dataset.busy === 'false'");
  const shown = await run(`({
    title: document.title,
    turns: [...document.querySelectorAll('.turn')].map((turn) => turn.className),
    cost: document.querySelector('.cost').textContent,
    ground: getComputedStyle(document.body).backgroundColor,
    nameless: [...document.querySelectorAll('button, input, textarea, meter')]
      .filter((e) => !e.labels?.length && !e.textContent.trim()).map((e) => e.id),
  })`);
  console.log(JSON.stringify({ first, ...shown, complaints }));
}

const timer = setTimeout(() => {
  console.error("too slow");
  browser.kill("SIGKILL");
  process.exit(1);
}, 3 * PATIENCE_MS);
try {
  await main();
} finally {
  clearTimeout(timer);
  browser.removeAllListeners("exit");
  browser.kill();
}
