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

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

export function setKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export const overview = () => ask("v1/overview");

export const scale = (teacher, replicas) =>
  ask(`v1/teachers/${encodeURIComponent(teacher)}/replicas`, {
    method: "PUT",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ replicas }),
  });

async function ask(path, { headers = {}, ...options } = {}) {
  const key = sessionStorage.getItem(KEY);
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
