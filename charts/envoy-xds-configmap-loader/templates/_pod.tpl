{{/* The loader's arguments that name the sources, in the pods and in `helm test`, as a YAML list. */}}
{{- define "xds.sourceArgs" -}}
{{- $v := .Values }}
{{- if include "xds.files" . | fromYaml }}
- --configmap={{ include "xds.fullname" . }}-xds
{{- end }}
{{- range $v.configMaps }}
- --configmap={{ with .namespace }}{{ . }}/{{ end }}{{ .name }}{{ with .directory }}:{{ . }}{{ end }}
{{- end }}
{{- with $v.configMapSelector }}
- {{ printf "--configmap-selector=%s" . | quote }}
{{- end }}
{{- if $v.services.enabled }}
- {{ printf "--services=%s" $v.services.selector | quote }}
{{- range $v.services.namespaces }}
- {{ printf "--services-namespace=%s" . | quote }}
{{- end }}
- --endpoints={{ $v.services.endpoints }}
- --format={{ $v.services.format }}
{{- end }}
{{- range $v.secrets }}
- --secret={{ with .namespace }}{{ . }}/{{ end }}{{ .name }}
{{- end }}
{{- if include "xds.config" . | fromYaml }}
- --config=/etc/xds-loader/loader.json
{{- end }}
{{- with $v.loader.apiserver }}
- --apiserver={{ . }}
{{- end }}
- --token-file={{ include "xds.tokenDir" . }}/token
- --ca-file={{ include "xds.tokenDir" . }}/ca.crt
- --output-dir={{ include "xds.dir" . }}
{{- with $v.loader.secretMode }}
- --secret-mode={{ . }}
{{- end }}
- --log-format={{ $v.loader.logFormat }}
- --log-level={{ $v.loader.logLevel }}
{{- range $v.loader.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end }}

{{/* The sidecar's own arguments. */}}
{{- define "xds.sidecarArgs" -}}
{{- if .Values.loader.watch }}
- --watch
{{- end }}
- --sync-interval={{ .Values.loader.syncInterval }}
- --listen=:{{ .Values.loader.port }}
{{- if .Values.loader.confirm }}
- --envoy-admin=unix:{{ include "xds.admin" . }}
{{- end }}
{{- end }}

{{/* What every container of the loader has; its last field is the list of mounts. */}}
{{- define "xds.loaderContainer" -}}
image: {{ include "xds.image" (dict "image" .Values.loader.image "tag" .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.loader.image.pullPolicy }}
env:
  - name: POD_NAMESPACE
    valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
  - name: NODE_NAME
    valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
  {{- with .Values.loader.env }}{{ toYaml . | nindent 2 }}{{ end }}
resources: {{- toYaml .Values.loader.resources | nindent 2 }}
securityContext: {{- toYaml .Values.securityContext | nindent 2 }}
volumeMounts:
  - {name: xds, mountPath: {{ include "xds.dir" . }}}
  - {name: token, mountPath: {{ include "xds.tokenDir" . }}, readOnly: true}
  {{- if include "xds.config" . | fromYaml }}
  - {name: loader-config, mountPath: /etc/xds-loader, readOnly: true}
  {{- end }}
  {{- with .Values.loader.extraVolumeMounts }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{/*
What the loader's preStop hook runs. Envoy's image has no shell and its admin interface accepts only
POST, on a Unix socket, which no httpGet hook can send; the loader's container mounts the socket and
has Python. /healthcheck/fail closes no listener: each response from then on carries
`connection: close` (HTTP/2: GOAWAY), and /ready answers 503.
*/}}
{{- define "xds.drain" -}}
import http.client, socket, sys
admin = http.client.HTTPConnection("envoy")
admin.sock = socket.socket(socket.AF_UNIX)
admin.sock.settimeout(2)
admin.sock.connect(sys.argv[1])
admin.request("POST", "/healthcheck/fail")
admin.getresponse().read()
{{- end }}

{{/*
The loader: a native sidecar. Envoy starts when its startup probe has passed, and at termination it
ends after Envoy. It has no readiness probe: a loader that is slow or dead takes no Envoy out of its
Service.
*/}}
{{- define "xds.sidecar" -}}
name: loader
restartPolicy: Always
{{ include "xds.loaderContainer" . }}
  {{- /* one more of its mounts; whoever may connect to a socket need not be able to write beside it */}}
  - {name: admin, mountPath: {{ include "xds.adminDir" . }}, readOnly: true}
args:
  {{- include "xds.sourceArgs" . | nindent 2 }}
  {{- include "xds.sidecarArgs" . | nindent 2 }}
ports:
  - {name: loader, containerPort: {{ .Values.loader.port }}, protocol: TCP}
startupProbe:
  httpGet: {path: /readyz, port: loader}
  {{- toYaml .Values.loader.startupProbe | nindent 2 }}
livenessProbe:
  httpGet: {path: /healthz, port: loader}
  {{- toYaml .Values.loader.livenessProbe | nindent 2 }}
{{- if .Values.loader.lifecycle }}
lifecycle: {{- toYaml .Values.loader.lifecycle | nindent 2 }}
{{- else if .Values.drain.enabled }}
lifecycle:
  preStop:
    exec:
      command:
        - python3
        - -I
        - -S
        - -c
        - | {{- include "xds.drain" . | nindent 10 }}
        - {{ include "xds.admin" . }}
{{- end }}
{{- end }}

{{- define "xds.envoy" -}}
name: envoy
image: {{ include "xds.image" (dict "image" .Values.envoy.image "tag" "") | quote }}
imagePullPolicy: {{ .Values.envoy.image.pullPolicy }}
command: [/usr/local/bin/envoy]
args:
  - --config-path
  - /etc/envoy/envoy.yaml
  - --service-cluster
  - {{ include "xds.fullname" . }}
  - --service-node
  - $(POD_NAME)
  - --log-level
  - {{ .Values.envoy.logLevel | quote }}
  {{- /* nothing hot restarts a container, and a second epoch would count the first one's events */}}
  - --disable-hot-restart
  {{- with .Values.envoy.concurrency }}
  - --concurrency
  - {{ . | quote }}
  {{- end }}
  {{- range .Values.envoy.extraArgs }}
  - {{ . | quote }}
  {{- end }}
env:
  - name: POD_NAME
    valueFrom: {fieldRef: {fieldPath: metadata.name}}
  {{- with .Values.envoy.env }}{{ toYaml . | nindent 2 }}{{ end }}
ports:
  {{- range $name, $port := .Values.envoy.ports }}
  - {{- mergeOverwrite (dict "name" $name "protocol" "TCP") $port | toYaml | nindent 4 }}
  {{- end }}
  - {name: ready, containerPort: {{ .Values.envoy.readyPort }}, protocol: TCP}
startupProbe:
  {{- /* 200 once this Envoy has ACKed its files; by number: the port's name is the loader's */}}
  httpGet: {path: {{ ternary "/startz" "/ready" .Values.loader.confirm }}, port: {{ ternary .Values.loader.port .Values.envoy.readyPort .Values.loader.confirm }}}
  {{- toYaml .Values.envoy.startupProbe | nindent 2 }}
livenessProbe:
  {{- /* not /ready: a draining Envoy answers 503 there and must not be killed for it */}}
  tcpSocket: {port: ready}
  {{- toYaml .Values.envoy.livenessProbe | nindent 2 }}
readinessProbe:
  httpGet: {path: /ready, port: ready}
  {{- toYaml .Values.envoy.readinessProbe | nindent 2 }}
{{- if .Values.envoy.lifecycle }}
lifecycle: {{- toYaml .Values.envoy.lifecycle | nindent 2 }}
{{- else if and .Values.drain.enabled (semverCompare ">=1.30-0" (include "xds.kubeVersion" .)) }}
lifecycle:
  preStop:
    sleep: {seconds: {{ .Values.drain.seconds }}}
{{- end }}
resources: {{- toYaml .Values.envoy.resources | nindent 2 }}
securityContext: {{- toYaml .Values.securityContext | nindent 2 }}
volumeMounts:
  - {name: xds, mountPath: {{ include "xds.dir" . }}, readOnly: true}
  - {name: admin, mountPath: {{ include "xds.adminDir" . }}}
  - {name: bootstrap, mountPath: /etc/envoy, readOnly: true}
  {{- with .Values.envoy.extraVolumeMounts }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}

{{/* The token of the loader: a volume of its own, so that Envoy's container does not have it. */}}
{{- define "xds.tokenVolume" -}}
name: token
projected:
  defaultMode: 0440
  sources:
    - serviceAccountToken:
        path: token
        expirationSeconds: {{ .Values.serviceAccount.tokenExpirationSeconds }}
    - configMap:
        name: kube-root-ca.crt
        items: [{key: ca.crt, path: ca.crt}]
    - downwardAPI:
        items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]
{{- end }}

{{- define "xds.pod" -}}
serviceAccountName: {{ include "xds.serviceAccountName" . }}
automountServiceAccountToken: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- toYaml .Values.podSecurityContext | nindent 2 }}
terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
{{- range $key := list "priorityClassName" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with get $.Values $key }}
{{ $key }}: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- if and (include "xds.several" .) (kindIs "slice" .Values.topologySpreadConstraints) (empty .Values.topologySpreadConstraints) }}
topologySpreadConstraints:
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "xds.selectorLabels" $ | nindent 8 }}
    matchLabelKeys: [pod-template-hash]
{{- end }}
{{- end }}
initContainers:
  {{- with .Values.extraInitContainers }}{{ toYaml . | nindent 2 }}{{ end }}
  - {{- include "xds.sidecar" . | nindent 4 }}
containers:
  - {{- include "xds.envoy" . | nindent 4 }}
  {{- with .Values.extraContainers }}{{ toYaml . | nindent 2 }}{{ end }}
volumes:
  - name: xds
    emptyDir: {medium: Memory, sizeLimit: {{ .Values.runtimeVolume.sizeLimit }}}
  {{- /* of its own, so that whoever mounts the files does not reach the admin interface */}}
  - name: admin
    emptyDir: {medium: Memory, sizeLimit: 1Mi}
  - name: bootstrap
    configMap: {name: {{ include "xds.fullname" . }}-bootstrap}
  - {{- include "xds.tokenVolume" . | nindent 4 }}
{{- if include "xds.config" . | fromYaml }}
  - name: loader-config
    configMap: {name: {{ include "xds.fullname" . }}-loader}
{{- end }}
  {{- with .Values.extraVolumes }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}
