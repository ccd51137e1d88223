// Numbers as they are read: three digits, a unit, thin spaces kept out so that they can be copied.

const grouped = new Intl.NumberFormat("en-GB");

/** 1234 -> "1,234". */
export const whole = (value) => grouped.format(Math.round(value));

/** 0.1234 -> "12%"; what is not known -> a dash. */
export const percent = (share) => (Number.isFinite(share) ? `${Math.round(100 * share)}%` : "–");

/** Three digits: 12.34 -> "12.3", 1234.5 -> "1,235". */
export function three(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  return size >= 100 ? whole(value) : size >= 10 ? value.toFixed(1) : size >= 1 ? value.toFixed(2) : value ? value.toFixed(3) : "0";
}

/** Decimal units, as memory rates are given: 269e6 -> "269 MB". */
export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (value >= 999.5 && at < units.length - 1) {
    value /= 1000;
    at += 1;
  }
  return `${at ? three(value) : Math.round(value)} ${units[at]}`;
}

/** Binary units, as memory is sold: 3 * 2 ** 30 -> "3.00 GiB". */
export function memory(value) {
  return value >= 2 ** 30 ? `${three(value / 2 ** 30)} GiB` : `${three(value / 2 ** 20)} MiB`;
}

/** 0.0123 -> "12.3 ms"; 1.234 -> "1.23 s". */
export function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  return value < 0.9995 ? `${three(1000 * value)} ms` : `${three(value)} s`;
}

/** A rung's kind: "self:mlp=0.5" -> "self". */
export const short = (rung) => rung.split(":")[0];
