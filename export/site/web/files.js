// The files of an engine: fetched from its own folder, checked against the manifest's hashes, kept by the browser.

const STORE = "latent-compress";

/** Where contents are kept: only pages served over https or from localhost have one. */
async function openStore() {
  return "caches" in globalThis ? caches.open(STORE) : null;
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Read a response to its end, telling how many bytes have come. */
async function drained(response, length, tell) {
  const bytes = new Uint8Array(length);
  let at = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) {
      break;
    }
    if (at + value.length > length) {
      return null;
    }
    bytes.set(value, at);
    at += value.length;
    tell(value.length);
  }
  return at === length ? bytes : null;
}

/** The files of one engine folder. */
export class Files {
  /** Read the manifest of a folder; `url` ends in a slash. */
  static async open(url) {
    const response = await fetch(new URL("manifest.json", url), { cache: "no-cache" });
    if (!response.ok) {
      throw new Error(`there is no engine at ${url}: manifest.json answers ${response.status}`);
    }
    const manifest = await response.json();
    if (manifest.schema_version !== 1) {
      throw new Error(`manifest.json has schema version ${manifest.schema_version}; this page reads 1`);
    }
    return new Files(url, manifest, await openStore());
  }

  constructor(url, manifest, store) {
    this.url = url;
    this.manifest = manifest;
    this.store = store;
    /** Path -> its bytes, while an engine is opened: several graphs share their weights. */
    this.read = new Map();
    this.fetched = 0;
    this.reused = 0;
    /** Why contents are not kept, if they are not. */
    this.notKept = store ? null : "the browser keeps files only of pages served over https or from localhost";
    this.onBytes = () => {};
  }

  /** How many bytes a file has. */
  size(path) {
    return this.entry(path).bytes;
  }

  /** The bytes of a file: those kept under its hash, or fetched, checked and then kept. */
  bytes(path) {
    if (!this.read.has(path)) {
      this.read.set(path, this.find(path));
    }
    return this.read.get(path);
  }

  async find(path) {
    const { sha256: hash, bytes: length } = this.entry(path);
    const key = this.key(hash);
    const held = await this.store?.match(key);
    if (held) {
      const bytes = new Uint8Array(await held.arrayBuffer());
      if (bytes.length === length) {
        this.reused += length;
        this.onBytes(length);
        return bytes;
      }
      await this.store.delete(key);
    }
    const response = await fetch(new URL(path, this.url), { cache: "no-cache" });
    if (!response.ok) {
      throw new Error(`the engine is incomplete: ${path} answers ${response.status}`);
    }
    const bytes = await drained(response, length, (count) => this.onBytes(count));
    this.fetched += length;
    if (!bytes || ("subtle" in crypto && (await sha256(bytes)) !== hash)) {
      throw new Error(`the engine is damaged: ${path} is not the file that was built`);
    }
    await this.keep(key, bytes);
    return bytes;
  }

  async json(path) {
    return JSON.parse(new TextDecoder().decode(await this.bytes(path)));
  }

  /** Let go of what was read, and of what is kept of earlier builds in this folder. */
  async tidy() {
    this.read.clear();
    const present = new Set(Object.values(this.manifest.files).map(({ sha256: hash }) => this.key(hash)));
    const prefix = this.key("");
    for (const { url } of (await this.store?.keys()) ?? []) {
      if (url.startsWith(prefix) && !present.has(url)) {
        await this.store.delete(url);
      }
    }
  }

  async keep(key, bytes) {
    try {
      await this.store?.put(key, new Response(bytes));
    } catch (error) {
      this.notKept = `the browser has no room to keep the files (${error.message})`;
    }
  }

  key(hash) {
    return new URL(`sha256/${hash}`, this.url).href;
  }

  entry(path) {
    const entry = this.manifest.files[path];
    if (!entry) {
      throw new Error(`manifest.json does not list ${path}`);
    }
    return entry;
  }
}
