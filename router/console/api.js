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
  if (answer.status === 401) throw new NeedsKey("This router asks for an API key");
  if (!answer.ok) throw new Error(content?.error?.message ?? `The router says ${answer.status}`);
  return content;
}
