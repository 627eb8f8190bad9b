// HostNetwork
