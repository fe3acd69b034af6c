/**
 * Marked's lexer, with bounds. Some of its patterns take time by the square of a text's length (30 KB of "*_*_a": 3 seconds),
 * so no inline text is longer than a piece, and no block longer than `MAX_BLOCK`. Knows no elements.
 */

import { Lexer } from "./vendor/marked/marked.js";

const OPTIONS = { gfm: true, breaks: true };
// What an inline text may hold: a longer one is read in pieces, and what spans two of them is shown as it was written.
const MAX_PIECE = 2000;
const MAX_MARKS = 200;
const MARK = /[*_~`[\]()<>!&@:\\]/g;
// Characters of blocks that are read at once.
const MAX_BLOCK = 16_384;

class BoundedLexer extends Lexer {
  inlineTokens(source, tokens = []) {
    let from = 0;
    for (const to of cuts(source)) {
      super.inlineTokens(source.slice(from, to), tokens);
      from = to;
    }
    super.inlineTokens(from ? source.slice(from) : source, tokens);
    return tokens;
  }
}

/** Give the block tokens of a text; what is nested too deeply to be read is shown as it was written. */
export function parsed(source) {
  const tokens = [];
  let rest = source;
  for (let most = MAX_BLOCK; rest.length > most; ) {
    const piece = rest.slice(0, lineEnd(rest, most));
    const read = lexed(piece);
    const whole = read.slice(0, Math.max(read.findLastIndex(({ type }) => type !== "space"), 0));
    const shown = whole.map(({ raw }) => raw).join("");
    if (!shown && read[0].type === "code") {
      most *= 2; // code is read in one go, however long it is
      continue;
    }
    const ends = shown && piece.startsWith(shown); // the last block may go on behind the piece
    tokens.push(...(ends ? whole : read));
    rest = rest.slice((ends ? shown : piece).length);
    most = MAX_BLOCK;
  }
  tokens.push(...lexed(rest));
  return tokens;
}

/** Give where a text is cut that is too long: behind a line if there is one. */
const lineEnd = (source, most) => source.lastIndexOf("\n", most - 1) + 1 || between(source, most);

/** Give where an inline text is cut: behind a space if there is one. */
function cuts(source) {
  const found = [];
  let from = 0;
  while (source.length - from > MAX_PIECE || marks(source, from) > MAX_MARKS) {
    const end = pieceEnd(source, from);
    if (end >= source.length) break;
    found.push((from = end));
  }
  return found;
}

function pieceEnd(source, from) {
  let most = Math.min(from + MAX_PIECE, source.length);
  MARK.lastIndex = from;
  for (let count = 0, mark; (mark = MARK.exec(source)) && mark.index < most; ) {
    if (++count > MAX_MARKS) most = mark.index;
  }
  if (most === source.length) return most;
  const piece = source.slice(from, most);
  const space = Math.max(piece.lastIndexOf(" "), piece.lastIndexOf("\n")) + 1;
  return space > piece.length / 2 ? from + space : between(source, most);
}

function marks(source, from) {
  let count = 0;
  MARK.lastIndex = from;
  while (count <= MAX_MARKS && MARK.exec(source)) count++;
  return count;
}

/** Give a place to cut that is not within a character. */
const between = (source, at) => (/[\ud800-\udbff]/.test(source[at - 1]) ? at - 1 : at);

function lexed(source) {
  try {
    return new BoundedLexer(OPTIONS).lex(source);
  } catch {
    return [{ type: "paragraph", raw: source, tokens: [{ type: "escape", raw: source, text: source }] }];
  }
}
