/** What the browser keeps for the page, and for one tab of it. Where it refuses to, the page keeps that itself, until it is closed. */

/** What a Storage does, of that which the page uses. */
class Memory {
  #kept = new Map();

  get length() {
    return this.#kept.size;
  }

  key(index) {
    return [...this.#kept.keys()][index];
  }

  getItem(key) {
    return this.#kept.get(key) ?? null;
  }

  setItem(key, value) {
    this.#kept.set(key, value);
  }

  removeItem(key) {
    this.#kept.delete(key);
  }
}

function opened(name) {
  try {
    return window[name] ?? new Memory();
  } catch {
    return new Memory(); // whoever blocks all cookies blocks this too, and then to look at it throws
  }
}

export const [browserStorage, tabStorage] = ["localStorage", "sessionStorage"].map(opened);

export const isForgetful = browserStorage instanceof Memory;
