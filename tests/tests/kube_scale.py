"""Nodes of a large cluster, and their heartbeats: `create CA COUNT HOST`, or `beat CA COUNT HOST SECONDS`, in which every
Node's status is patched each ten seconds, as far as the API server keeps up. Prints the number of patches."""
import http.client, json, ssl, sys, threading, time
what, ca, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
tls = ssl.create_default_context(cafile=ca)
head = {"Authorization": "Bearer token-of-admin"}
done, lock = [0], threading.Lock()
images = [{"names": ["registry.example.com/team/program-%d@sha256:%064d" % (i, i)], "sizeBytes": i} for i in range(50)]
def condition(now):
    return [{"type": t, "status": s, "reason": "Kubelet" + t, "message": "kubelet says so", "lastHeartbeatTime": now,
             "lastTransitionTime": "2026-01-01T00:00:00Z"}
            for t, s in (("MemoryPressure", "False"), ("DiskPressure", "False"), ("PIDPressure", "False"), ("Ready", "True"))]
class Api:
    def __init__(self): self.connection = None
    def ask(self, method, path, body, kind):
        for attempt in range(5):
            try:
                if self.connection is None:
                    self.connection = http.client.HTTPSConnection(sys.argv[4], 6443, context=tls, timeout=60)
                self.connection.request(method, path, json.dumps(body), {**head, "Content-Type": kind})
                answer = self.connection.getresponse()
                text = answer.read()
                if answer.status < 300 or answer.status == 409:
                    return
                if answer.status != 429: sys.exit("%s %s: %d %s" % (method, path, answer.status, text[:300]))
                time.sleep(1)
            except (OSError, http.client.HTTPException):
                self.connection = None
        sys.exit("no answer to " + path)
def name(n): return "node-%04d" % n
def create(api, n):
    p = "flannel.alpha.coreos.com/"
    api.ask("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name(n), "annotations": {
        p + "backend-data": '{"VNI":1,"VtepMAC":"02:00:00:00:%02x:%02x"}' % (n >> 8, n & 255), p + "backend-type": "vxlan",
        p + "kube-subnet-manager": "true", p + "public-ip": "172.16.%d.%d" % (n >> 8, n & 255)}},
        "spec": {"podCIDR": "10.%d.%d.0/24" % (128 + (n >> 8), n & 255)}}, "application/json")
    api.ask("PATCH", "/api/v1/nodes/%s/status" % name(n), {"status": {"images": images, "conditions": condition("2026-01-01T00:00:00Z")}},
        "application/strategic-merge-patch+json")
def beat(api, n):
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    api.ask("PATCH", "/api/v1/nodes/%s/status" % name(n), {"status": {"conditions": condition(now)}}, "application/strategic-merge-patch+json")
threads = 16
def work(t):
    api = Api()
    if what == "create":
        for n in range(2 + t, count + 1, threads): create(api, n)
        return
    end = time.time() + float(sys.argv[5])
    while time.time() < end:
        began = time.time()
        for n in range(2 + t, count + 1, threads):
            if time.time() >= end: return
            beat(api, n)
            with lock: done[0] += 1
        time.sleep(max(0, min(began + 10, end) - time.time()))
all_ = [threading.Thread(target=work, args=(t,)) for t in range(threads)]
for t in all_: t.start()
for t in all_: t.join()
print(done[0])
