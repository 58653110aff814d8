// An image of the user's: what is refused before anything is sent, and why, in one line.

const MOST_MIB = 10;
const MOST_PIXELS = 64e6; // a picture of a few MiB may be of any size once it is unpacked
const TYPES = { "image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WebP", "image/gif": "GIF", "image/bmp": "BMP" };

/** Why a file is not taken, by its type and size alone; null where it may be. Pure. */
export function refusal(file) {
  if (!(file.type in TYPES)) {
    const what = file.type === "" ? "a file of unknown type" : file.type;
    return `“${file.name}” is ${what}. Choose an image: PNG, JPEG, WebP, GIF or BMP.`;
  }
  if (file.size > MOST_MIB * 2 ** 20) {
    const size = (file.size / 2 ** 20).toFixed(1);
    return `“${file.name}” has ${size} MiB; up to ${MOST_MIB} MiB are taken. Save it smaller: models scale images down anyway.`;
  }
  return file.size === 0 ? `“${file.name}” is empty. Choose another image.` : null;
}

/**
 * Reads a file that is an image.
 *
 * Returns {url (data:), name, width, height, sample: null, questions: []}; throws an Error of one line.
 */
export async function read(file) {
  const reason = refusal(file);
  if (reason !== null) throw new Error(reason);
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`“${file.name}” could not be read from the disk. Choose it again.`));
    reader.readAsDataURL(file);
  });
  const { width, height } = await size(url, file.name);
  return { url, name: file.name, width, height, sample: null, questions: [] };
}

/** Width and height in pixels of an image that the browser can show; throws an Error of one line where it can't. */
export async function size(url, name) {
  const picture = await load(url).catch(() => {
    throw new Error(`“${name}” is broken: it can't be shown as an image. Choose another one.`);
  });
  const { naturalWidth: width, naturalHeight: height } = picture;
  if (width * height > MOST_PIXELS) {
    throw new Error(`“${name}” has ${width} × ${height} pixels; up to 64 megapixels are taken. Save it smaller.`);
  }
  return { width, height };
}

/** An image element, loaded and decoded. */
export function load(url) {
  return new Promise((resolve, reject) => {
    const picture = new Image();
    picture.onload = () => (picture.naturalWidth > 0 ? resolve(picture) : reject(new Error("empty")));
    picture.onerror = () => reject(new Error("broken"));
    picture.src = url;
  });
}
