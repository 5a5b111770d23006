// A tokenizer read from one tokenizer.json: normalizers, pre-tokenizers, byte-pair and unigram models, templates.
//
// Sources: Sennrich et al. 2016, arXiv 1508.07909 (byte pairs); Kudo 2018, arXiv 1804.10959 (unigrams).

const GPT2 = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;
const UNKNOWN_PENALTY = 10;

/** Printable characters that stand for the 256 bytes. */
const BYTES = (() => {
  const own = [[0x21, 0x7e], [0xa1, 0xac], [0xae, 0xff]];
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => {
    const printable = own.some(([low, high]) => low <= byte && byte <= high);
    return String.fromCodePoint(printable ? byte : next++);
  });
})();

/** A regular expression of the file as one of this language; white space is Unicode's in both. */
function regex(pattern) {
  const source = pattern.replace(/\\([\s\S])/g, (whole, letter) => ({ s: "\\p{White_Space}", S: "\\P{White_Space}" })[letter] ?? whole);
  return new RegExp(source, "gu");
}

function matcher(pattern) {
  if (pattern.Regex !== undefined) {
    return regex(pattern.Regex);
  }
  return new RegExp(pattern.String.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&"), "gu");
}

function unknown(what, value) {
  return new Error(`tokenizer.json has the ${what} ${value}, which this page cannot read`);
}

const NORMALIZERS = {
  Sequence: (spec) => {
    const steps = spec.normalizers.map(normalizer);
    return (text) => steps.reduce((result, step) => step(result), text);
  },
  NFC: () => (text) => text.normalize("NFC"),
  NFD: () => (text) => text.normalize("NFD"),
  NFKC: () => (text) => text.normalize("NFKC"),
  NFKD: () => (text) => text.normalize("NFKD"),
  Lowercase: () => (text) => Array.from(text, (letter) => letter.toLowerCase()).join(""),
  Replace: (spec) => (text) => text.replace(matcher(spec.pattern), () => spec.content),
  Prepend: (spec) => (text) => (text ? spec.prepend + text : text),
  Strip: (spec) => (text) => {
    const left = spec.strip_left ? text.replace(/^\p{White_Space}+/u, "") : text;
    return spec.strip_right ? left.replace(/\p{White_Space}+$/u, "") : left;
  },
  StripAccents: () => (text) => text.replace(/\p{Mn}/gu, ""),
  Precompiled: (spec) => precompiled(spec.precompiled_charsmap),
};

function normalizer(spec) {
  if (!spec) {
    return (text) => text;
  }
  if (!Object.hasOwn(NORMALIZERS, spec.type)) {
    throw unknown("normalizer", spec.type);
  }
  return NORMALIZERS[spec.type](spec);
}

/** SentencePiece's character map: a double-array trie over UTF-8, whose values are places of replacement texts. */
function precompiled(base64) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const size = view.getUint32(0, true);
  const units = Uint32Array.from({ length: size / 4 }, (_, at) => view.getUint32(4 + 4 * at, true));
  const texts = bytes.subarray(4 + size);
  const offset = (unit) => (unit >>> 10) << ((unit & 0x200) >>> 6);
  const encoder = new TextEncoder();
  const decoder = new TextDecoder();
  const mapped = (text) => {
    let node = offset(units[0]);
    for (const byte of encoder.encode(text)) {
      node ^= byte;
      const unit = units[node];
      if (unit === undefined || (unit & 0x800000ff) >>> 0 !== byte) {
        return null;
      }
      node ^= offset(unit);
      if ((unit >>> 8) & 1) {
        const start = units[node] & 0x7fffffff;
        return decoder.decode(texts.subarray(start, texts.indexOf(0, start)));
      }
    }
    return null;
  };
  const graphemes = new Intl.Segmenter(undefined, { granularity: "grapheme" });
  return (text) =>
    Array.from(graphemes.segment(text), ({ segment }) => {
      const whole = encoder.encode(segment).length < 6 ? mapped(segment) : null;
      return whole ?? Array.from(segment, (letter) => mapped(letter) ?? letter).join("");
    }).join("");
}

/** Cut a text at the matches of a pattern: [piece, whether it is a match]. */
function cut(text, pattern) {
  const pieces = [];
  let from = 0;
  for (const match of text.matchAll(pattern)) {
    if (match[0] === "") {
      continue;
    }
    if (match.index > from) {
      pieces.push([text.slice(from, match.index), false]);
    }
    pieces.push([match[0], true]);
    from = match.index + match[0].length;
  }
  if (from < text.length) {
    pieces.push([text.slice(from), false]);
  }
  return pieces;
}

const PRE_TOKENIZERS = {
  Sequence: (spec) => {
    const steps = spec.pretokenizers.map(preTokenizer);
    return (text, first) =>
      steps.reduce((pieces, step) => pieces.flatMap((piece, at) => step(piece, first && at === 0)), [text]);
  },
  Split: (spec) => {
    const pattern = matcher(spec.pattern);
    if (!["Removed", "Isolated"].includes(spec.behavior)) {
      throw unknown("split behaviour", spec.behavior);
    }
    return (text) =>
      cut(text, pattern)
        .filter(([, match]) => spec.behavior === "Isolated" || match === spec.invert)
        .map(([piece]) => piece);
  },
  WhitespaceSplit: () => (text) => text.split(/\p{White_Space}+/u).filter(Boolean),
  Whitespace: () => (text) => text.match(/[\p{L}\p{N}\p{M}\p{Pc}]+|[^\p{L}\p{N}\p{M}\p{Pc}\p{White_Space}]+/gu) ?? [],
  ByteLevel: (spec) => {
    const encoder = new TextEncoder();
    return (text) => {
      const led = spec.add_prefix_space && !text.startsWith(" ") ? ` ${text}` : text;
      const pieces = spec.use_regex === false ? [led] : led.match(GPT2) ?? [];
      return pieces.map((piece) => Array.from(encoder.encode(piece), (byte) => BYTES[byte]).join(""));
    };
  },
  Metaspace: (spec) => (text, first) => {
    const mark = spec.replacement;
    const scheme = spec.prepend_scheme ?? (spec.add_prefix_space === false ? "never" : "always");
    const marked = text.replaceAll(" ", mark);
    const leads = scheme === "always" || (scheme === "first" && first);
    const led = leads && !marked.startsWith(mark) ? mark + marked : marked;
    if (spec.split === false) {
      return [led];
    }
    const pieces = [];
    for (const letter of led) {
      if (letter === mark || !pieces.length) {
        pieces.push(letter);
      } else {
        pieces[pieces.length - 1] += letter;
      }
    }
    return pieces;
  },
};

function preTokenizer(spec) {
  if (!spec) {
    return (text) => [text];
  }
  if (!Object.hasOwn(PRE_TOKENIZERS, spec.type)) {
    throw unknown("pre-tokenizer", spec.type);
  }
  return PRE_TOKENIZERS[spec.type](spec);
}

/** Ids of the bytes of a letter, where the vocabulary has all of them. */
function byteIds(letter, ids) {
  const names = Array.from(new TextEncoder().encode(letter), (byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
  return names.every((name) => ids.has(name)) ? names.map((name) => ids.get(name)) : null;
}

/** Byte pairs: join the neighbours of the lowest rank until none has one. */
function bytePairs(spec) {
  const ids = new Map(Object.entries(spec.vocab));
  const prefix = spec.continuing_subword_prefix ?? "";
  const suffix = spec.end_of_word_suffix ?? "";
  const merges = new Map();
  spec.merges.forEach((pair, rank) => {
    const [left, right] = Array.isArray(pair) ? pair : pair.split(" ");
    merges.set(`${ids.get(left)} ${ids.get(right)}`, [rank, ids.get(left + right.slice(right.startsWith(prefix) ? prefix.length : 0))]);
  });
  const unknownId = spec.unk_token == null ? null : ids.get(spec.unk_token);
  return (word) => {
    if (spec.ignore_merges && ids.has(word)) {
      return [ids.get(word)];
    }
    const letters = Array.from(word);
    const parts = [];
    let fused = false;
    letters.forEach((letter, at) => {
      const name = (at ? prefix : "") + letter + (at === letters.length - 1 ? suffix : "");
      const bytes = ids.has(name) || !spec.byte_fallback ? null : byteIds(letter, ids);
      if (ids.has(name)) {
        parts.push(ids.get(name));
      } else if (bytes) {
        parts.push(...bytes);
      } else if (unknownId != null && !(spec.fuse_unk && fused)) {
        parts.push(unknownId);
      }
      fused = !ids.has(name) && !bytes;
    });
    for (;;) {
      let best = null;
      for (let at = 0; at + 1 < parts.length; at += 1) {
        const merge = merges.get(`${parts[at]} ${parts[at + 1]}`);
        if (merge && (best === null || merge[0] < best[1])) {
          best = [at, ...merge];
        }
      }
      if (best === null) {
        return parts;
      }
      parts.splice(best[0], 2, best[2]);
    }
  };
}

/** Unigrams: the most probable pieces that make up the word, by Viterbi. */
function unigrams(spec) {
  const ids = new Map();
  let least = Infinity;
  let longest = 1;
  spec.vocab.forEach(([piece, score], id) => {
    if (!ids.has(piece)) {
      ids.set(piece, id);
    }
    least = Math.min(least, score);
    longest = Math.max(longest, Array.from(piece).length);
  });
  return (word) => {
    const letters = Array.from(word);
    const best = letters.map(() => null);
    best.unshift({ score: 0 });
    for (let from = 0; from < letters.length; from += 1) {
      let alone = false;
      let piece = "";
      for (let to = from + 1; to <= Math.min(letters.length, from + longest); to += 1) {
        piece += letters[to - 1];
        const id = ids.get(piece);
        if (id === undefined) {
          continue;
        }
        alone ||= to === from + 1;
        const score = best[from].score + spec.vocab[id][1];
        if (best[to] === null || score > best[to].score) {
          best[to] = { score, from, id };
        }
      }
      const score = best[from].score + least - UNKNOWN_PENALTY;
      if (!alone && (best[from + 1] === null || score > best[from + 1].score)) {
        best[from + 1] = { score, from, id: spec.unk_id };
      }
    }
    const found = [];
    for (let to = letters.length; to > 0; to = best[to].from) {
      found.unshift({ id: best[to].id, letters: letters.slice(best[to].from, to).join("") });
    }
    const parts = [];
    let text = "";
    found.forEach(({ id, letters: piece }, at) => {
      if (id !== spec.unk_id) {
        parts.push(id);
        return;
      }
      text += piece;
      if (found[at + 1]?.id !== spec.unk_id) {
        parts.push(...((spec.byte_fallback && byteIds(text, ids)) || [spec.unk_id]));
        text = "";
      }
    });
    return parts;
  };
}

const MODELS = { BPE: bytePairs, Unigram: unigrams };

/** What comes before and after the tokens of one text. */
function template(spec) {
  if (!spec || spec.type === "ByteLevel") {
    return [[], []];
  }
  if (spec.type === "RobertaProcessing" || spec.type === "BertProcessing") {
    return [[spec.cls[1]], [spec.sep[1]]];
  }
  if (spec.type === "TemplateProcessing") {
    const place = spec.single.findIndex((item) => item.Sequence);
    const special = (items) => items.flatMap((item) => spec.special_tokens[item.SpecialToken.id].ids);
    return [special(spec.single.slice(0, place)), special(spec.single.slice(place + 1))];
  }
  if (spec.type === "Sequence") {
    const parts = spec.processors.map(template);
    return [parts.toReversed().flatMap(([before]) => before), parts.flatMap(([, after]) => after)];
  }
  throw unknown("post-processor", spec.type);
}

const WORD = /[\p{L}\p{N}\p{M}\p{Pc}]/u;

/** Find added tokens in a text: pieces that are either a text or the id of a token. */
function addedIn(text, tokens) {
  const pieces = [];
  let from = 0;
  for (let at = 0; at < text.length; at += 1) {
    const token = tokens.find(({ content, single_word: single }) => {
      const end = at + content.length;
      return text.startsWith(content, at) && !(single && (WORD.test(text[at - 1] ?? "") || WORD.test(text[end] ?? "")));
    });
    if (!token) {
      continue;
    }
    const before = token.lstrip ? text.slice(from, at).replace(/\p{White_Space}+$/u, "") : text.slice(from, at);
    pieces.push(...(before ? [before] : []), token.id);
    from = at + token.content.length;
    if (token.rstrip) {
      from += text.slice(from).match(/^\p{White_Space}*/u)[0].length;
    }
    at = from - 1;
  }
  return from < text.length ? [...pieces, text.slice(from)] : pieces;
}

/** Prompts to padded token ids; the padding token and side are those of the file. */
export class Tokenizer {
  /** @param {object} file the parsed tokenizer.json. */
  constructor(file) {
    if (!file.padding) {
      throw new Error("tokenizer.json does not say how to pad");
    }
    if (!Object.hasOwn(MODELS, file.model.type)) {
      throw unknown("model", file.model.type);
    }
    this.padding = file.padding;
    this.truncation = file.truncation?.direction ?? "Right";
    this.normalize = normalizer(file.normalizer);
    this.split = preTokenizer(file.pre_tokenizer);
    this.pieces = MODELS[file.model.type](file.model);
    [this.before, this.after] = template(file.post_processor);
    const longest = (tokens) => tokens.sort((a, b) => b.content.length - a.content.length);
    const added = file.added_tokens ?? [];
    this.raw = longest(added.filter((token) => !token.normalized));
    this.normalized = longest(
      added.filter((token) => token.normalized).map((token) => ({ ...token, content: this.normalize(token.content) })),
    );
  }

  /**
   * Tokenize, cut and pad one prompt.
   * @returns {{ids: number[], mask: number[]}} each of maxLength.
   */
  encode(prompt, maxLength) {
    const tokens = addedIn(prompt, this.raw).flatMap((piece, at) => {
      if (typeof piece !== "string") {
        return [piece];
      }
      // What begins with letters that normalizing drops does not begin where the prompt does.
      const begins = at === 0 && this.normalize(String.fromCodePoint(piece.codePointAt(0))) !== "";
      return addedIn(this.normalize(piece), this.normalized).flatMap((part, inner) => {
        const first = begins && inner === 0;
        return typeof part === "string" ? this.split(part, first).flatMap(this.pieces) : [part];
      });
    });
    const room = maxLength - this.before.length - this.after.length;
    const kept = tokens.length <= room ? tokens : this.truncation === "Right" ? tokens.slice(0, room) : tokens.slice(-room);
    const ids = [...this.before, ...kept, ...this.after];
    const padding = Array(maxLength - ids.length).fill(this.padding.pad_id);
    const ones = ids.map(() => 1);
    const zeros = padding.map(() => 0);
    return this.padding.direction === "Left"
      ? { ids: [...padding, ...ids], mask: [...zeros, ...ones] }
      : { ids: [...ids, ...padding], mask: [...ones, ...zeros] };
  }
}
