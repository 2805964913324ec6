// Hidden states of texts by a model of a local folder, as transformers.js computes them: node embed.cjs FOLDER DTYPE TEXTS
const path = require("path");
const { AutoModel, AutoTokenizer, env } = require("@huggingface/transformers");
const [folder, dtype, texts] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder) + "/";
(async () => {
  const name = path.basename(folder);
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  const model = await AutoModel.from_pretrained(name, { dtype });
  const { last_hidden_state: found } = await model(await tokenizer(JSON.parse(texts), { padding: true }));
  console.log(JSON.stringify({ sizes: found.dims, values: Array.from(found.data) }));
})();
