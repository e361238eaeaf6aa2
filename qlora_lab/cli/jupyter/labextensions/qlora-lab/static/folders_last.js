// JupyterLab lists folders first and has no setting for it. This plugin moves them behind the files, with CSS alone.
// It is written as webpack's module federation would build it: a container with `init` and `get`.
const STYLE = `
.jp-DirListing-content { display: flex; flex-direction: column; }
.jp-DirListing-content > .jp-DirListing-item { flex: none; }
.jp-DirListing-content > .jp-DirListing-item[data-isdir="true"] { order: 1; }
`;

function activate() {
  const style = document.createElement("style");
  style.textContent = STYLE;
  document.head.append(style);
}

const plugin = { id: "qlora-lab:folders-last", autoStart: true, activate };
window._JUPYTERLAB = window._JUPYTERLAB || {};
window._JUPYTERLAB["qlora-lab"] = {
  init() {},
  get: async () => () => ({ __esModule: true, default: plugin }),
};
