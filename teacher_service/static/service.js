// Talks to the service. The key is kept in this tab's session and nowhere else.

const KEY = "potstill.key";
const PATIENCE_MS = 10000;

export class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

export class Unreachable extends Error {}

// The browser sends no request with a header that it cannot hold: such a key would look like a service that is gone.
const isSendable = (key) => /^[\x20-\x7e]+$/.test(key);

function storedKey() {
  const key = sessionStorage.getItem(KEY);
  return key !== null && isSendable(key) ? key : null;
}

export const hasKey = () => storedKey() !== null;

// Why it cannot be used, or an empty text after keeping it. An empty key forgets the one that was kept.
export function setKey(key) {
  if (key && !isSendable(key)) return "this has characters that no key has; paste it as `potstill keys add` printed it";
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  return "";
}

export const overview = () => ask("v1/overview");

export const scale = (teacher, replicas) =>
  ask(`v1/teachers/${encodeURIComponent(teacher)}/replicas`, {
    method: "PUT",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ replicas }),
  });

async function ask(path, { headers = {}, ...options } = {}) {
  const key = storedKey();
  if (key !== null) headers.authorization = `Bearer ${key}`;
  let answer;
  let body;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    body = await answer.text();
  } catch (error) {
    throw new Unreachable(error.name === "TimeoutError" ? "no answer in time" : "no connection");
  }
  const value = parsed(body);
  if (!answer.ok) throw new Refused(answer.status, value?.detail ?? `it answered ${answer.status}`);
  if (value === null) throw new Unreachable("something else answers at this address");
  return value;
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
