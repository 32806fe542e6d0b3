// SPDX-License-Identifier: Apache-2.0
// Search runs in a worker, which browsers do not start for pages from disk. There a hidden frame
// runs the worker's script. The file is named so that zensical does not load another one like it.
if (location.protocol === "file:") {
  // As between a page and a worker, a message is copied and comes later.
  const send = (receiver, data) => {
    const event = new MessageEvent("message", { data: structuredClone(data) });
    setTimeout(() => receiver.onmessage?.(event));
  };

  window.Worker = class {
    constructor(address) {
      this.frame = document.body.appendChild(document.createElement("iframe"));
      this.frame.hidden = true;
      this.inside = this.frame.contentWindow;
      this.inside.postMessage = (data) => send(this, data);
      const script = this.inside.document.createElement("script");
      script.src = new URL(address, location.href).href;
      this.loaded = new Promise((resolve) => {
        script.onload = resolve;
      });
      script.onerror = () => this.onerror?.(new Event("error", { cancelable: true }));
      this.inside.document.body.append(script);
    }

    postMessage(data) {
      const copy = structuredClone(data);
      this.loaded.then(() => send(this.inside, copy));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
