/* A click on "Copy" or "Insert below", handled by the box around them, with the means that every browser has. */
(async (box, button) => {
  if (!button) return;
  const text = box.parentElement.querySelector('pre'), code = text.textContent;
  const say = (words) => { box.querySelector('[role=status]').textContent = words; };
  const notebook = button.closest('.jp-NotebookPanel'), cell = button.closest('.jp-Cell');
  const active = () => notebook?.querySelector('.jp-Cell.jp-mod-active');
  const isInsert = button.textContent.startsWith('Insert');
  if (isInsert) {
    /* The notebook's own button makes a cell below the active one, which a click here has made this one. */
    const more = active() === cell && notebook.querySelector('[data-command="notebook:insert-cell-below"]');
    if (more) more.dispatchEvent(new MouseEvent('mousedown', { bubbles: true, cancelable: true }));
    for (let pause = 0; more && pause < 40 && active() === cell; pause++) await new Promise((go) => setTimeout(go, 50));
    const field = active() !== cell && active()?.querySelector('.cm-content');
    if (field) {
      const pasted = new DataTransfer();
      pasted.setData('text/plain', code);
      field.dispatchEvent(new ClipboardEvent('paste', { clipboardData: pasted, bubbles: true, cancelable: true }));
      if (field.textContent.includes('%%extract')) return say('Inserted');
    }
  }
  let isCopied = await navigator.clipboard?.writeText(code).then(() => true, () => false);
  if (!isCopied) {
    getSelection().selectAllChildren(text);
    isCopied = document.execCommand('copy');
  }
  if (!isCopied) say('This browser forbids it. The code is selected: press Ctrl+C.');
  else say(isInsert ? 'Copied, but no cell could be inserted here. Paste it into a new cell.' : 'Copied');
})(this, event.target.closest('button'));
