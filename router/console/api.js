// Calls to the router. The API key lives in this tab's session storage.

const KEY = "kvferry-api-key";
const DEADLINE = 5000; // ms

export class NeedsKey extends Error {}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const setKey = (key) => sessionStorage.setItem(KEY, key);

export async function call(path, { method = "GET", body = null, patience = DEADLINE } = {}) {
  const key = sessionStorage.getItem(KEY);
  let answer;
  let content;
  try {
    answer = await fetch(`../admin/${path}`, {
      method,
      headers: {
        ...(key === null ? {} : { Authorization: `Bearer ${key}` }),
        ...(body === null ? {} : { "Content-Type": "application/json" }),
      },
      body: body === null ? null : JSON.stringify(body),
      signal: AbortSignal.timeout(patience),
    });
    content = await answer.json();
  } catch {
    throw new Error("No answer from the router");
  }
  if (answer.ok) return content;
  const message = content?.error?.message ?? `The router says ${answer.status}`;
  // Another key helps to read; a change is refused with 403 where no key allows it.
  const needsKey = answer.status === 401 || (answer.status === 403 && method === "GET");
  throw needsKey ? new NeedsKey(message) : new Error(message);
}
