// Talks to the server: adds the API key, reads streams of events. Paths are relative to the page, so
// that it also works behind a proxy that serves it under a prefix.

const KEY = "headrace-api-key";

/** An answer that was an error: its HTTP status (0: none, or inside a stream), and the field at fault. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);

/** The response to a GET, or to a POST if there is a body. Throws ApiError unless it is a success. */
export async function ask(path, { body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { headers, signal, method: body ? "POST" : "GET", body: body && JSON.stringify(body) };
  const response = await fetch(path, options).catch((error) => {
    if (signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached. Does it still run?");
  });
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { error } = (await response.json().catch(() => null)) ?? {};
  const wait = response.headers.get("retry-after");
  const text = error?.message ?? "It did not say why.";
  return new ApiError(wait ? `${text} Try again in ${wait} s.` : text, { status: response.status, param: error?.param });
}

function lost(error) {
  if (error.name === "AbortError") throw error;
  throw new ApiError("The connection was lost.");
}

/** The JSON values of a response's events, until its end or "[DONE]". */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(lost);
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ")) continue;
        const data = part.slice("data: ".length);
        if (data === "[DONE]") return;
        const parsed = JSON.parse(data);
        if (parsed.error) throw new ApiError(parsed.error.message, { param: parsed.error.param });
        yield parsed;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
