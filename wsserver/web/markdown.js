/**
 * Markdown to elements, piece by piece as it comes. What a model says is hostile until proven otherwise: no text ever becomes
 * markup here, every element is made by its name from the lists below, and a link leads to the web or is none.
 */

import { parsed } from "./bounded_lexer.js";
import { copyButton } from "./clipboard.js";

const SAFE = new Set(["http:", "https:", "mailto:"]);
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };
const DEEPEST = 40;
const OPEN_FENCE = /^(`{3,}|~{3,})([^\n]*)\n/;
// A render may take this share of the time that has passed since the last one began.
const SHARE = 0.2;

/** An answer that grows: what is whole stays as it is, and only the block at the end is made anew. */
export class Markdown {
  #root;
  #whenShown;
  #source = ""; // of the blocks that are not whole
  #nodes = []; // that show it
  #fence = null; // the code block at the end, while it is open: text is only added to it
  #frame = null;
  #restUntil = 0;

  constructor(root, whenShown = () => {}) {
    this.#root = root;
    this.#whenShown = whenShown;
  }

  /** Add text; it is shown with the next frame of the screen. */
  append(text) {
    this.#source += text.replaceAll("\r", "");
    this.#frame ??= requestAnimationFrame((now) => this.#show(now));
  }

  /** Show all there is now. */
  finish() {
    cancelAnimationFrame(this.#frame);
    this.#show(Infinity);
    this.#fence?.end(this.#source);
  }

  #show(now) {
    this.#frame = null;
    if (now < this.#restUntil) {
      this.#frame = requestAnimationFrame((later) => this.#show(later));
      return;
    }
    const began = performance.now();
    do this.#showBlocks();
    while (this.#fence?.closed && this.#leaveFence());
    const took = performance.now() - began;
    this.#restUntil = began + took / SHARE;
    this.#whenShown();
  }

  #showBlocks() {
    if (this.#fence) {
      this.#source = this.#fence.take(this.#source);
      return;
    }
    this.#settle();
    const tokens = parsed(this.#source);
    this.#nodes = this.#replace(blocks(tokens));
    const open = OPEN_FENCE.exec(this.#source);
    if (open && tokens[0].type === "code") this.#enterFence(open);
  }

  /** Let go of the blocks that no later text can change: all before the last one. */
  #settle() {
    // An unfinished line may still become anything, even a part of the list above it.
    const lines = this.#source.slice(0, this.#source.lastIndexOf("\n") + 1);
    const tokens = parsed(lines);
    const last = tokens.findLastIndex(({ type }) => type !== "space");
    const whole = tokens.slice(0, Math.max(last, 0));
    const source = whole.map(({ raw }) => raw).join("");
    if (!source || !lines.startsWith(source)) return;
    this.#replace(blocks(whole));
    this.#source = this.#source.slice(source.length);
  }

  /** Show other elements in the place of what may still change, and give them. */
  #replace(elements) {
    this.#nodes.forEach((node) => node.remove());
    this.#nodes = [];
    const before = this.#root.childNodes.length;
    this.#root.append(...elements);
    return [...this.#root.childNodes].slice(before);
  }

  #enterFence([opening, fence, language]) {
    const { block, code } = codeBlock(language.trim());
    this.#replace([block]);
    this.#fence = new Fence(code, fence);
    this.#source = this.#fence.take(this.#source.slice(opening.length));
  }

  #leaveFence() {
    this.#fence = null;
    return this.#source !== "";
  }
}

/** A code block that is open: takes lines until the one that closes it. */
class Fence {
  closed = false;
  #text = document.createTextNode("");
  #closing;
  #inLine = false; // part of the present line is shown already
  #before = ""; // the line break that comes first, if anything comes

  constructor(code, fence) {
    this.#closing = new RegExp("^ {0,3}" + fence + "[~`]* *$");
    code.append(this.#text);
  }

  /** Show what can be shown, and give the rest back. */
  take(source) {
    for (let end; !this.closed && (end = source.indexOf("\n")) >= 0; source = source.slice(end + 1)) {
      const line = source.slice(0, end);
      if (!this.#inLine && this.#closing.test(line)) this.closed = true;
      else {
        this.#add(line);
        this.#before = "\n";
        this.#inLine = false;
      }
    }
    if (this.closed || (!this.#inLine && /^ {0,3}[`~]* *$/.test(source))) return source;
    this.#add(source);
    this.#inLine = true;
    return "";
  }

  /** Show what was kept back, as no more comes. */
  end(rest) {
    if (rest && !this.#closing.test(rest)) this.#add(rest);
  }

  #add(text) {
    this.#text.appendData(this.#before + text);
    this.#before = "";
  }
}

/** Make the elements of block tokens. */
export const blocks = (tokens, depth = 0) => made(BLOCKS, tokens, depth);

const inline = (tokens, depth) => made(INLINE, tokens, depth);

// What is nested deeper than anybody reads is text: such elements cost a browser more than they show.
function made(kinds, tokens, depth) {
  if (depth > DEEPEST) return tokens.map(({ raw }) => raw);
  return tokens.flatMap((token) => (kinds[token.type] ?? BLOCKS[token.type] ?? asWritten)(token, depth + 1));
}

const asWritten = ({ raw }) => raw;

const BLOCKS = {
  space: () => [],
  def: () => [],
  hr: () => element("hr"),
  html: ({ raw }) => element("p", [raw.trimEnd()]),
  heading: ({ depth: level, tokens }, depth) => element(`h${Math.min(level + 2, 6)}`, inline(tokens, depth)),
  paragraph: ({ tokens }, depth) => element("p", inline(tokens, depth)),
  text: ({ tokens, text }, depth) => (tokens ? inline(tokens, depth) : [decoded(text)]),
  checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  blockquote: ({ tokens }, depth) => element("blockquote", blocks(tokens, depth)),
  code: ({ lang, text }) => {
    const { block, code } = codeBlock(lang);
    code.append(text);
    return block;
  },
  list: ({ ordered, start, items }, depth) => {
    const entries = items.map(({ tokens }) => element("li", blocks(tokens, depth)));
    const list = element(ordered ? "ol" : "ul", entries);
    if (ordered && start !== 1) list.start = start;
    return list;
  },
  table: ({ header, rows }, depth) => {
    const cell = (name, { tokens, align }) => element(name, inline(tokens, depth), align ? `align-${align}` : "");
    const row = (cells, name) => element("tr", cells.map((each) => cell(name, each)));
    const body = rows.map((cells) => row(cells, "td"));
    return element("div", [element("table", [element("thead", [row(header, "th")]), element("tbody", body)])], "table");
  },
};

const INLINE = {
  text: ({ text }) => decoded(text),
  html: asWritten,
  escape: ({ text }) => text,
  br: () => element("br"),
  codespan: ({ text }) => element("code", [text]),
  strong: ({ tokens }, depth) => element("strong", inline(tokens, depth)),
  em: ({ tokens }, depth) => element("em", inline(tokens, depth)),
  del: ({ tokens }, depth) => element("del", inline(tokens, depth)),
  link: ({ href, tokens }, depth) => link(href, inline(tokens, depth)),
  // A picture that a model names would be fetched from wherever it says, and tell there that it was read.
  image: ({ href, text }) => link(href, [`[${text || "picture"}]`]),
};

function element(name, children = [], className = "") {
  const created = document.createElement(name);
  created.append(...children);
  if (className) created.className = className;
  return created;
}

function link(href, children) {
  if (!URL.canParse(href) || !SAFE.has(new URL(href).protocol)) return element("span", children);
  return Object.assign(element("a", children), { href, target: "_blank", rel: "noopener noreferrer nofollow" });
}

function codeBlock(language) {
  const block = document.querySelector("#code").content.cloneNode(true).firstElementChild;
  const code = block.querySelector("code");
  block.querySelector(".language").textContent = (language ?? "").split(/\s/)[0];
  block.querySelector("pre").ariaLabel = "Code";
  copyButton(block.querySelector("button"), () => code.textContent);
  return { block, code };
}

function decoded(text) {
  return text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|([a-z]+));/gi, (whole, decimal, hex, name) => {
    if (name) return ENTITIES[name.toLowerCase()] ?? whole;
    const point = decimal ? Number(decimal) : Number.parseInt(hex, 16);
    return point > 0 && point <= 0x10ffff ? String.fromCodePoint(point) : "\ufffd";
  });
}
