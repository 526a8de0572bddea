/* Decoding of instance masks and label maps as the server sends them. */

/**
 * Decodes COCO's run lengths.
 * @param {{size: number[], counts: string|number[]}} rle Size [height, width]; the runs go down the
 *     columns, the first one is outside the mask.
 * @returns {{width: number, height: number, pixels: Uint8Array}} 1 inside, row by row.
 */
export function decodeRle({ size: [height, width], counts }) {
  const pixels = new Uint8Array(width * height);
  const runs = typeof counts === "string" ? decodeCounts(counts) : counts;
  let position = 0;
  runs.forEach((length, index) => {
    const end = Math.min(position + length, pixels.length);
    if (index % 2) {
      for (let i = position; i < end; i += 1) {
        pixels[(i % height) * width + Math.floor(i / height)] = 1;
      }
    }
    position = end;
  });
  return { width, height, pixels };
}

/** Decodes COCO's string: 5 bits a character, from the third run on differences to two before. */
function decodeCounts(text) {
  const counts = [];
  let index = 0;
  while (index < text.length) {
    let value = 0;
    let shift = 0;
    let bits;
    do {
      bits = text.charCodeAt(index) - 48;
      value |= (bits & 31) << shift;
      shift += 5;
      index += 1;
    } while (bits & 32);
    if (bits & 16) value |= -1 << shift;
    counts.push(counts.length > 2 ? value + counts[counts.length - 2] : value);
  }
  return counts;
}

/**
 * Decodes a PNG of labels in base64, with or without "data:image/png;base64,".
 * @returns {Promise<{width: number, height: number, labels: Uint8ClampedArray}>}
 */
export async function decodeLabelMap(text) {
  const binary = atob(text.slice(text.indexOf(",") + 1));
  const bytes = Uint8Array.from(binary, (character) => character.charCodeAt(0));
  if (bytes[24] === 16) throw new Error("it has more than 256 labels");
  const blob = new Blob([bytes], { type: "image/png" });
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const { width, height } = bitmap;
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  return { width, height, labels: data.filter((_, index) => index % 4 === 0) };
}
