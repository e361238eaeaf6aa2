// Time llama.cpp: {file, threads, packages}, then a line {prompt, steps} for each sample, each answered by a line of JSON.
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const say = (value) => process.stdout.write(JSON.stringify(value) + "\n");
const next = async () => JSON.parse((await lines.next()).value ?? "null");
const { file, threads, packages } = await next();
const path = createRequire(`${packages}/`).resolve("node-llama-cpp");
const { getLlama, LlamaLogLevel, getModuleVersion } = await import(pathToFileURL(path));
// The binary of the package, on the CPU: nothing is fetched, nothing is compiled.
const options = { gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error, maxThreads: threads };
const llama = await getLlama(options);
const model = await llama.loadModel({ modelPath: file });
const context = await model.createContext({ contextSize: 1024, batchSize: 512, threads });
const sequence = context.getSequence();
say({ version: await getModuleVersion(), release: llama.llamaCppRelease.release });
for (let asked = await next(); asked; asked = await next()) {
  await sequence.clearHistory();
  const start = performance.now();
  const times = []; // of each token
  for await (const _ of sequence.evaluate(asked.prompt, { temperature: 0, yieldEogToken: true })) {
    times.push((performance.now() - start) / 1000);
    if (times.length === asked.steps) break;
  }
  say({ first: times[0], rest: times.at(-1) - times[0], tokens: times.length });
}
await llama.dispose();
