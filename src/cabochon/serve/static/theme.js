// Light, dark, or as the system has it.

const STORE = "cabochon-theme";
const NAMES = { auto: "Auto", light: "Light", dark: "Dark" };
const SIGNS = { auto: "◐", light: "☀", dark: "☾" };

export function setUpTheme(button) {
  const apply = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `${SIGNS[theme]} ${NAMES[theme]}`;
    button.setAttribute("aria-label", `Colours: ${NAMES[theme]}`);
    localStorage.setItem(STORE, theme);
  };
  const order = Object.keys(NAMES);
  let theme = localStorage.getItem(STORE);
  if (!order.includes(theme)) theme = "auto";
  apply(theme);
  button.onclick = () => apply((theme = order[(order.indexOf(theme) + 1) % order.length]));
}
