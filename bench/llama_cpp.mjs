// Answer texts greedily with llama.cpp: JSON {file, texts, steps} on standard input, JSON on standard output.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const { file, texts, steps, packages } = JSON.parse(readFileSync(0, "utf8"));
const path = createRequire(`${packages}/`).resolve("node-llama-cpp");
const { getLlama, LlamaLogLevel, getModuleVersion } = await import(pathToFileURL(path));
// The binary of the package, on the CPU: nothing is fetched, nothing is compiled.
const options = { gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error };
const llama = await getLlama(options);
const model = await llama.loadModel({ modelPath: file });
const context = await model.createContext({ contextSize: 512, threads: 1 });
const sequence = context.getSequence();
const tokens = texts.map((text) => model.tokenize(text, true)); // special tokens are read as such
const answers = [];
for (const prompt of tokens) {
  await sequence.clearHistory();
  const answer = [];
  for await (const token of sequence.evaluate(prompt, { temperature: 0 })) {
    answer.push(token);
    if (answer.length === steps) break;
  }
  answers.push(answer);
}
const template = model.fileInfo.metadata.tokenizer.chat_template ?? null;
const version = await getModuleVersion();
const result = { version, release: llama.llamaCppRelease.release, tokens, answers, template };
await llama.dispose();
process.stdout.write(JSON.stringify(result));
