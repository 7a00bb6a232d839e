// The few ways in which this page touches the DOM. Text is only ever set as text.

export function element(tag, { className = "", text = "", ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Sets text only where it differs, so that a selection or a reading aloud is not cut off.
export function say(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

// Keeps one view for each named thing, in order: views are made once and shown again, so that focus and what was
// typed stay where they are.
export class Views {
  constructor(container, make) {
    this.container = container;
    this.make = make;
    this.views = new Map();
  }

  show(things, nameOf) {
    const names = new Set(things.map(nameOf));
    for (const [name, view] of this.views) {
      if (!names.has(name)) {
        view.element.remove();
        this.views.delete(name);
      }
    }
    things.forEach((thing, index) => {
      const name = nameOf(thing);
      if (!this.views.has(name)) this.views.set(name, this.make(thing));
      const view = this.views.get(name);
      if (this.container.children[index] !== view.element) {
        this.container.insertBefore(view.element, this.container.children[index] ?? null);
      }
      view.show(thing);
    });
  }
}
