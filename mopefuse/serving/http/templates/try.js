"use strict";
// The form: models, values, requests. Nothing is stored; the address of the page keeps the name of the model.
(() => {
  const kinds = JSON.parse(document.getElementById("modalities").textContent);
  const at = (id) => document.getElementById(id);
  const fields = new Map(); // by modality, the input element
  let models = [];
  let pictureUrl = "";
  let waiting = false;

  const chosen = () => models.find((model) => model.name === at("model").value);
  const valueOf = (name) => (kinds[name]?.file ? fields.get(name).files[0] : fields.get(name).value) || null;
  const given = () => [...fields.keys()].map((name) => [name, valueOf(name)]).filter(([, value]) => value !== null);
  const headers = () => (at("key").value ? { Authorization: `Bearer ${at("key").value}` } : {});

  // Requests

  const ask = async (path, options = {}) => {
    let response;
    try {
      response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers }, cache: "no-store" });
    } catch {
      throw { message: "the server cannot be reached", where: location.origin, hint: "check that mopefuse serve is running, and that the key has only plain characters" };
    }
    const answer = await response.json().catch(() => ({}));
    if (response.ok) return answer;
    if (response.status === 401) {
      at("key-field").hidden = false;
      at("key").focus();
    }
    throw answer.error ?? { message: `the server answered with status ${response.status}`, hint: "send it again later" };
  };

  const readFile = (file) => new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject({ message: `${file.name} cannot be read`, hint: "choose the file again" });
    reader.readAsDataURL(file);
  });

  const fail = (error) => {
    const known = typeof error?.message === "string" ? error : { message: String(error) };
    at("error").replaceChildren(...showError(known));
    at("result").replaceChildren();
  };

  const predict = async () => {
    const model = chosen();
    const row = { model: model.name, routing: true };
    for (const [name, value] of given()) row[name] = value instanceof File ? await readFile(value) : value;
    const began = performance.now();
    const body = JSON.stringify(row);
    const answer = await ask("predict", { method: "POST", body, headers: { "Content-Type": "application/json" } });
    const milliseconds = performance.now() - began;
    const picture = given().find(([name]) => kinds[name]?.picture)?.[1];
    const parts = await showAnswer(answer, model, picture);
    const time = make("p", { class: "soft small", id: "time" }, `${model.name} answered in ${milliseconds.toFixed(0)} ms`);
    at("error").replaceChildren();
    at("result").replaceChildren(...parts, time);
  };

  const submit = async () => {
    if (waiting) return;
    waiting = true;
    at("send").setAttribute("aria-disabled", "true");
    at("status").textContent = "waiting for the answer …";
    try {
      if (!models.length) await loadModels();
      if (chosen()?.error) throw chosen().error;
      if (chosen()) await predict();
    } catch (error) {
      fail(error);
    } finally {
      waiting = false;
      at("send").removeAttribute("aria-disabled");
      at("status").textContent = "";
    }
  };

  // Values

  const preview = (name, holder) => {
    holder.querySelector("img")?.remove();
    URL.revokeObjectURL(pictureUrl);
    const file = valueOf(name);
    if (!file || !kinds[name]?.picture) return;
    pictureUrl = URL.createObjectURL(file);
    const image = make("img", { alt: `preview of ${readable(file.name)}` });
    image.addEventListener("load", () => image.classList.toggle("enlarged", Math.max(image.naturalWidth, image.naturalHeight) < 100));
    image.addEventListener("error", () => image.remove());
    image.src = pictureUrl;
    holder.append(image);
  };

  const fileField = (name, id) => {
    const input = make("input", { type: "file", id, "aria-describedby": `${id}-hint`, ...(kinds[name].picture ? { accept: "image/*" } : {}) });
    const holder = make("div", { class: "drop" }, input, make("p", { class: "hint", id: `${id}-hint` }, "Choose a file, or drop one here."));
    input.addEventListener("change", () => { preview(name, holder); showCurl(); });
    holder.addEventListener("dragover", (event) => { event.preventDefault(); holder.classList.add("over"); });
    holder.addEventListener("dragleave", () => holder.classList.remove("over"));
    holder.addEventListener("drop", (event) => {
      event.preventDefault();
      holder.classList.remove("over");
      if (!event.dataTransfer.files.length) return;
      input.files = event.dataTransfer.files;
      input.dispatchEvent(new Event("change"));
    });
    return [input, holder];
  };

  const addField = (name) => {
    const id = `value-${name}`;
    let input, shown;
    if (kinds[name]?.file) [input, shown] = fileField(name, id);
    else {
      input = shown = make("textarea", { id, rows: 3, dir: "auto" });
      input.addEventListener("input", showCurl);
    }
    fields.set(name, input);
    const title = name.charAt(0).toUpperCase() + name.slice(1);
    return make("div", { "data-modality": name }, make("label", { for: id }, title), shown);
  };

  const showFields = (model) => {
    const wanted = model?.modalities ?? [];
    for (const holder of [...at("values").children]) {
      if (wanted.includes(holder.dataset.modality)) continue; // what was entered stays for the next model
      fields.delete(holder.dataset.modality);
      holder.remove();
    }
    for (const name of wanted) if (!fields.has(name)) at("values").append(addField(name));
  };

  // The command

  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const fileName = (name) => `"${name.replaceAll("\\", "\\\\").replaceAll('"', '\\"')}"`;

  const showCurl = () => {
    const parts = [`curl ${quote(new URL("predict", document.baseURI).href)}`];
    if (!at("key-field").hidden) parts.push('-H "Authorization: Bearer $MOPEFUSE_API_KEY"');
    if (chosen()) parts.push(`--form-string ${quote(`model=${chosen().name}`)}`);
    for (const name of fields.keys()) {
      const value = valueOf(name);
      if (kinds[name]?.file) parts.push(`-F ${quote(`${name}=@${fileName(value?.name ?? "FILE")}`)}`);
      else if (value) parts.push(`--form-string ${quote(`${name}=${value}`)}`);
    }
    at("curl").textContent = parts.join(" \\\n  ");
  };

  const copy = async () => {
    try {
      await navigator.clipboard.writeText(at("curl").textContent);
      at("copied").textContent = "copied";
    } catch {
      getSelection().selectAllChildren(at("curl"));
      at("copied").textContent = "selected; press Ctrl+C";
    }
  };

  // Models

  const choose = () => {
    const model = chosen();
    const facts = model?.error ? ["it cannot be used"] : [model?.task, model?.method, model?.labels && `${model.labels.length} labels`];
    at("facts").textContent = readable(facts.filter(Boolean).join(" · "));
    at("error").replaceChildren();
    at("result").replaceChildren();
    showFields(model);
    showCurl();
    if (model) history.replaceState(null, "", `?model=${encodeURIComponent(model.name)}`);
    if (model?.error) fail(model.error);
  };

  const loadModels = async () => {
    models = (await ask("models")).models;
    const options = models.map((model) => make("option", { value: model.name }, model.error ? `${model.name} (cannot be used)` : model.name));
    at("model").replaceChildren(...options);
    const wanted = new URLSearchParams(location.search).get("model");
    const known = models.some((model) => model.name === wanted);
    if (known) at("model").value = wanted;
    choose();
    if (!models.length) throw { message: "the server has no model yet", hint: "add one to its folder, and load this page again" };
    if (wanted && !known) throw { message: `no model ${readable(wanted)} is served`, where: "model", hint: "choose one of the list" };
  };

  const reload = async () => {
    models = [];
    try {
      await loadModels();
    } catch (error) {
      if (!models.length) at("model").replaceChildren(make("option", { value: "" }, "none"));
      fail(error);
      showCurl();
    }
  };

  at("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  at("model").addEventListener("change", choose);
  at("key").addEventListener("change", reload);
  at("copy").addEventListener("click", copy);
  reload();
})();
