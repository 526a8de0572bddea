/* Colors of labels: those of beit3.report.palette, so that a label looks as in reports. */

const COLORS = [
  "#f05a1e", "#005af0", "#00f0ff", "#e169ff", "#00785a", "#ffd200", "#b40078", "#00c34b",
  "#1ea5d2", "#ffa5b4", "#00ff87", "#962dd2", "#a54b1e", "#b47896", "#0069a5", "#b4b4ff",
  "#d2a500", "#6978ff", "#788700", "#78c3b4", "#ff4bb4", "#e10f5a", "#b4e1b4", "#00a587",
  "#c34bc3", "#875a96", "#96d200", "#96a569", "#f07887", "#ff87e1", "#f0c3ff", "#9687e1",
  "#2d8796", "#ffb469", "#0fc3ff", "#b4784b", "#b45aff", "#69690f", "#c396c3", "#0087d2",
  "#00e196", "#5a5ad2", "#b4c378", "#a55a69", "#ff874b", "#a5f000", "#00a500", "#a500a5",
  "#e12d96", "#00872d", "#8769d2", "#d20000", "#ff3c69", "#b41e4b", "#7887b4", "#87a500",
  "#5aa5ff", "#96d2f0", "#695aff", "#a5e178", "#d2873c", "#2db4b4", "#5a875a", "#b496ff",
  "#e1a587", "#3cc387", "#693ce1", "#d269c3", "#87a5d2", "#b44b96", "#00d2e1", "#d25a69",
  "#f0d296", "#ffc3d2", "#3cf0c3", "#0096ff", "#00e15a", "#f01e2d", "#c38778", "#d2c32d",
  "#874bb4", "#0078f0", "#a56900", "#e1a5d2", "#4ba55a", "#ff78b4", "#c30fa5", "#a569b4",
  "#5a69b4", "#a5870f", "#964bf0", "#ff69f0", "#87c34b", "#f0a5ff", "#b469e1", "#c34b3c",
  "#96694b", "#e196a5", "#d287e1", "#964b4b", "#e15a96", "#d20078", "#0f5ad2", "#ffa500",
  "#96d2b4", "#ff695a", "#b42dc3", "#d25a00", "#c3a569", "#963c87", "#4b96a5", "#1ee1d2",
  "#c35a87", "#9678ff", "#87874b", "#007896", "#6987e1", "#ff5a96", "#5a78a5", "#d2e15a",
  "#3c963c", "#e1695a", "#a587c3", "#e178a5", "#78c3f0", "#4b5ab4", "#a53c69", "#a53ca5",
  "#69b45a", "#e18769", "#87f0a5", "#783cc3", "#e14bd2", "#6969e1", "#ffb496", "#96e1e1",
  "#695a87", "#78782d", "#69b496", "#c33c5a", "#966996", "#1e69ff", "#b49600", "#87c387",
  "#b44be1", "#965ab4", "#2d7878", "#3cd2a5", "#f01e78", "#3cb4e1", "#00d278", "#2db400",
  "#69f04b", "#6978c3", "#875a78", "#7896d2", "#875a1e", "#a587ff", "#b4a5e1", "#4bd20f",
  "#f07800", "#0f8769", "#0087b4", "#4b783c", "#f069d2", "#c3c3ff", "#ff8778", "#c378e1",
  "#d2d278", "#e187ff", "#a596e1", "#87b4ff", "#ffa5e1", "#ffc34b", "#699669", "#b4b44b",
  "#f0a55a", "#0069c3", "#b46969", "#96d269", "#c35aa5", "#0fb487", "#009687", "#0f96c3",
  "#964bd2", "#1e96e1", "#784be1", "#c369ff", "#0078b4", "#2df096", "#1e7800", "#78e1a5",
  "#e13cb4", "#b42d2d", "#f0961e", "#c3780f", "#b4d296", "#96964b", "#0078d2", "#a5e13c",
  "#ff87ff", "#009669", "#a5f069", "#a5e1ff", "#87d2d2", "#0087f0", "#4b6996", "#0069e1",
  "#ff3c3c", "#d20f96", "#c387a5", "#1ed2ff", "#2dc3c3", "#78c3d2", "#8769f0", "#ff96c3",
  "#96b400", "#5aa52d", "#e196f0", "#00c3a5", "#d23c78", "#e187c3", "#5af0e1", "#d29687",
  "#1ed2c3", "#e14b4b", "#5aa596", "#00e1f0", "#d23c00", "#69a578", "#e1c387", "#b49669",
  "#d27887", "#d2b45a", "#78e15a", "#d2003c", "#e1b4f0", "#ff9696", "#f0b4d2", "#f03ca5",
  "#e1965a", "#009600", "#87960f", "#2dc3e1", "#3ca5b4", "#ff87a5", "#962db4", "#ffc3b4",
  "#5a7800", "#69b4c3", "#d2d200", "#96b469", "#00b44b", "#b44b78", "#87a5f0", "#d24be1",
];

/** Returns the color of a label, an integer from 0, as "#rrggbb". */
export function getColor(label) {
  return COLORS[label % COLORS.length];
}

/** Returns the color of a label as [red, green, blue], each 0 to 255. */
export function getRgb(label) {
  const number = parseInt(getColor(label).slice(1), 16);
  return [number >> 16, (number >> 8) & 255, number & 255];
}

/** Returns black or white, whichever is easier to read on the color of a label. */
export function getTextColor(label) {
  const [red, green, blue] = getRgb(label).map((value) => {
    const level = value / 255;
    return level <= 0.04045 ? level / 12.92 : ((level + 0.055) / 1.055) ** 2.4;
  });
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return luminance > 0.18 ? "#101010" : "#ffffff";
}
