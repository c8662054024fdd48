const written = document.querySelector("time");
const age = written.insertAdjacentElement("afterend", document.createElement("span"));
const overdue = document.querySelector(".overdue");
function show() {
  const minutes = Math.max(0, Math.floor((Date.now() - Date.parse(written.dateTime)) / 60000));
  const [count, unit] = minutes < 120 ? [minutes, "minute"] : [Math.floor(minutes / 60), "hour"];
  age.textContent = `, ${new Intl.RelativeTimeFormat("en").format(-count, unit)}`;
  overdue.hidden = minutes < overdue.dataset.minutes;
}
show();
setInterval(show, 60000);
