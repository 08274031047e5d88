// Shows only the samples that contain every word typed. The page works without this script.
for (const search of document.querySelectorAll(".search")) {
  const [input, output] = [search.querySelector("input"), search.querySelector("output")];
  const samples = [...search.parentElement.querySelectorAll(".sample")];
  const texts = samples.map(sample => sample.textContent.toLowerCase());
  const update = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = texts.map(text => words.every(word => text.includes(word)));
    samples.forEach((sample, i) => { sample.hidden = !matches[i]; });
    const count = matches.filter(Boolean).length;
    output.textContent = words.length ? `${count} of ${samples.length} shown` : "";
  };
  input.addEventListener("input", update);
  search.hidden = false;
  update();
}
