// What nginx.conf checks with nginx's own JavaScript module: bodies of predictions, and health.

// Cog calls the URL of a webhook, whatever its address. Add webhook and webhook_events_filter only
// for clients that you trust.
const FIELDS = ["id", "input"];
const FILES = ["depth_image", "image"]; // Cog fetches a URL, whatever its address, size and speed
const PAUSES = 20; // of 100 ms, to wait for room: Cog has it a moment after its last answer

function refuse(r, code, loc, msg) {
    r.headersOut["Content-Type"] = "application/json";
    // In the form of Cog's own errors.
    r.return(code, JSON.stringify({ detail: [{ loc: loc, msg: msg, type: "value_error" }] }));
}

// Cog makes a folder of it. In some versions of njs, $ also matches before a newline at the end.
function isId(value) {
    const length = typeof value === "string" ? value.length : 0;
    return length >= 1 && length <= 64 && !/[^A-Za-z0-9_-]/.test(value);
}

function isObject(value) {
    return value !== null && typeof value === "object" && !Array.isArray(value);
}

// What is wrong with a body, as the place and the rule, or null.
function problem(body) {
    if (!isObject(body)) {
        return [["body"], "must be an object"];
    }
    const unknown = Object.keys(body).filter((name) => FIELDS.indexOf(name) < 0)[0];
    if (unknown !== undefined) {
        return [["body", unknown.slice(0, 40)], "is not allowed here"];
    }
    if (body.id !== undefined && !isId(body.id)) {
        return [["body", "id"], "must have 1 to 64 letters, digits, hyphens and underscores"];
    }
    if (!isObject(body.input)) {
        return [["body", "input"], "must be an object"];
    }
    for (let i in FILES) {
        const file = body.input[FILES[i]];
        if (file !== undefined && !(typeof file === "string" && file.startsWith("data:"))) {
            return [["body", "input", FILES[i]], "must be a data: URL, not the address of a file"];
        }
    }
    return null;
}

async function status(r) {
    const answer = await r.subrequest("/cog-health", { method: "GET" });
    try {
        return JSON.parse(answer.responseText).status;
    } catch (e) {
        return "DOWN";
    }
}

async function predict(r) {
    let body;
    try {
        body = JSON.parse(r.requestText);
    } catch (e) {
        return refuse(r, 400, ["body"], "must be JSON");
    }
    const found = problem(body);
    if (found) {
        return refuse(r, 422, found[0], found[1]);
    }
    let state = await status(r);
    for (let i = 0; i < PAUSES && state === "BUSY"; i++) {
        await new Promise((resolve) => setTimeout(resolve, 100));
        state = await status(r);
    }
    if (state !== "READY" && state !== "BUSY") {
        r.headersOut["Retry-After"] = "10";
        return refuse(r, 503, [], `the server is ${state}`);
    }
    r.variables.checked = JSON.stringify(body); // so that Cog reads just what was checked
    r.internalRedirect("@cog");
}

// Cog answers with 200 in every state.
async function health(r) {
    const state = await status(r);
    r.headersOut["Content-Type"] = "application/json";
    r.return(state === "READY" || state === "BUSY" ? 200 : 503, JSON.stringify({ status: state }));
}

export default { health, predict };
