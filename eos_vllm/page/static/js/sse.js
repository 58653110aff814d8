// Server-sent events of a chat completion. Pure.

/** Cuts a stream into the `data:` of its events, however its chunks are cut. */
export class Events {
  constructor() {
    this.rest = "";
  }

  /** The events that are whole with this chunk; `[DONE]` and comments are left out. */
  push(chunk) {
    this.rest += chunk;
    const parts = this.rest.split(/\r?\n\r?\n/);
    this.rest = parts.pop();
    return parts.flatMap((part) => {
      const data = part
        .split(/\r?\n/)
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).replace(/^ /, ""))
        .join("\n");
      return data === "" || data === "[DONE]" ? [] : [data];
    });
  }
}

/** What an error answer says, in one line of at most 300 characters. */
export function oneLine(text, status) {
  let said = text;
  try {
    const body = JSON.parse(text);
    const error = body.error ?? body.detail ?? body.message ?? body;
    if (typeof error === "string") said = error;
    else if (Array.isArray(error)) said = error.map((e) => `${(e.loc ?? []).join(".")}: ${e.msg ?? ""}`).join("; ");
    else said = error.message ?? JSON.stringify(error);
  } catch {
    if (/^\s*</.test(text)) said = ""; // a page of some proxy's
  }
  said = String(said).replace(/\s+/g, " ").trim();
  if (said === "") said = `the server answered with HTTP ${status}`;
  return said.length > 300 ? `${said.slice(0, 297)}…` : said;
}
