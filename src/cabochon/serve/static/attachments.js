// Pictures, sounds and videos on their way into a message: chosen, pasted or dropped.

import { el } from "./markdown.js";

const SOUNDS = { wav: "wav", wave: "wav", "x-wav": "wav", mpeg: "mp3", mp3: "mp3", flac: "flac", "x-flac": "flac", ogg: "ogg", opus: "ogg" };

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

// A part of a message, as OpenAI's API takes it.
async function part(file) {
  const [kind, subtype] = file.type.split("/");
  if (kind === "image") return { type: "image_url", image_url: { url: await read(file) } };
  if (kind === "video") return { type: "video_url", video_url: { url: await read(file) } };
  const format = SOUNDS[subtype];
  if (kind === "audio" && format) {
    const data = (await read(file)).replace(/^[^,]*,/, "");
    return { type: "input_audio", input_audio: { data, format } };
  }
  throw new Error(`${file.name} is neither a picture, a video, nor a sound in WAV, MP3, FLAC or Ogg`);
}

// What shows a part in a message; `name` is the file's.
export function preview(item) {
  const url = item.part.image_url?.url ?? item.part.video_url?.url;
  if (item.part.image_url) return el("img", { src: url, alt: item.name });
  if (item.part.video_url) return el("video", { src: url, controls: true, title: item.name });
  const { data, format } = item.part.input_audio;
  return el("audio", { src: `data:audio/${format};base64,${data}`, controls: true, title: item.name });
}

export class Attachments {
  constructor(list, say) {
    this.list = list;
    this.say = say;
    this.items = [];
  }

  async add(files) {
    for (const file of files) {
      try {
        const item = { name: file.name || "pasted", part: await part(file) };
        this.items.push(item);
        this.say(`${item.name} attached`);
      } catch (error) {
        this.say(error.message, true);
      }
    }
    this.draw();
  }

  take() {
    const taken = this.items;
    this.items = [];
    this.draw();
    return taken;
  }

  draw() {
    this.list.replaceChildren(
      ...this.items.map((item) => {
        const remove = el("button", { type: "button", className: "plain" }, "Remove");
        remove.setAttribute("aria-label", `Remove ${item.name}`);
        remove.onclick = () => {
          this.items = this.items.filter((other) => other !== item);
          this.draw();
        };
        const picture = item.part.image_url ? el("img", { src: item.part.image_url.url, alt: "" }) : null;
        return el("li", {}, picture, el("span", { className: "label" }, item.name), remove);
      }),
    );
  }
}
